"""Activation surfaces: the largest magnitude in each cell of tokens × channels, small enough for a page."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ...errors import RunError
from .words import number

_NAME = re.compile(r"(?P<block>.*?\.(?P<number>\d+))\.(?P<layer>.+)\|(?P<state>original|transformed)")
_MOST_BLOCKS = 8
_LARGEST = 255  # of a byte
# Not safetensors; dtypes that numpy hasn't; metadata that are no numbers; too few or too many dimensions.
_DAMAGED = (OSError, SafetensorError, AttributeError, TypeError, ValueError, IndexError)


@dataclass(frozen=True)
class Grid:
    """One surface.

    Attributes:
        rows: cells along the tokens.
        columns: cells along the channels.
        data: base64 of a byte for each cell, row by row: ``peak · (byte / 255)²`` is its magnitude. The square keeps
            small magnitudes apart beside large ones.
        largest: its own largest magnitude.
        spoken: the same in words.
    """

    rows: int
    columns: int
    data: str
    largest: float
    spoken: str


@dataclass(frozen=True)
class Pair:
    """An input before and after the transforms, with one scale.

    Attributes:
        layer: name in the block of a Linear that reads it.
        peak: the largest magnitude of both.
        channels: of the input.
        original: before.
        transformed: after; None where nothing transforms.
    """

    layer: str
    peak: float
    channels: int
    original: Grid
    transformed: Grid | None

    @property
    def shown(self) -> str:
        """The scale's upper end, in words."""
        return number(self.peak, 3)


@dataclass(frozen=True)
class BlockSurfaces:
    """The surfaces of one block."""

    number: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Surfaces:
    """All surfaces that a page shows.

    Attributes:
        tokens: how many were looked at.
        blocks: those shown.
        stored: how many blocks the file has.
    """

    tokens: int
    blocks: tuple[BlockSurfaces, ...]
    stored: int


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file.

    Attributes:
        name: its own.
        block: number of the block.
        layer: name in the block.
        state: ``original`` or ``transformed``.
    """

    name: str
    block: int
    layer: str
    state: str


def read_surfaces(file: Path) -> Surfaces | None:
    """The surfaces of a run; of more blocks than a page should carry, some in even distances. None if it has none.

    Raises:
        RunError: the file is damaged.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            return _read(opened)
    except _DAMAGED as problem:
        raise RunError(f"{file} can't be read: {problem}", "remove it to have a report without surfaces") from problem


def _read(opened: Any) -> Surfaces | None:
    metadata = opened.metadata() or {}
    matches = (_NAME.fullmatch(name) for name in opened.keys())  # noqa: SIM118 (no mapping)
    entries = [_Entry(one[0], int(one["number"]), one["layer"], one["state"]) for one in matches if one is not None]
    blocks = sorted({entry.block for entry in entries})
    chosen = _spread(blocks, _MOST_BLOCKS)
    loaded = {entry: opened.get_tensor(entry.name) for entry in entries if entry.block in chosen}
    if not loaded:
        return None
    shown = tuple(BlockSurfaces(block, tuple(_pairs(block, loaded, metadata))) for block in chosen)
    return Surfaces(int(metadata.get("tokens", 0)), shown, len(blocks))


def _spread(blocks: list[int], most: int) -> list[int]:
    if len(blocks) <= most:
        return blocks
    return [blocks[round(index * (len(blocks) - 1) / (most - 1))] for index in range(most)]


def _pairs(block: int, loaded: Mapping[_Entry, NDArray[Any]], metadata: Mapping[str, str]) -> Iterable[Pair]:
    order = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    found: dict[str, dict[str, _Entry]] = {}
    for entry in loaded:
        if entry.block == block:
            found.setdefault(entry.layer, {})[entry.state] = entry
    ranked = {layer: next((i for i, leaf in enumerate(order) if layer.endswith(leaf)), len(order)) for layer in found}
    for layer in sorted(found, key=lambda layer: (ranked[layer], layer)):
        if "original" in found[layer]:
            yield _pair(layer, found[layer], loaded, metadata)


def _pair(
    layer: str, entries: Mapping[str, _Entry], loaded: Mapping[_Entry, NDArray[Any]], metadata: Mapping[str, str]
) -> Pair:
    cells = {state: loaded[entry].astype(np.float64) for state, entry in entries.items()}
    peak = max(float(values.max(initial=0.0)) for values in cells.values())
    channels = _channels(entries["original"].name, metadata) or cells["original"].shape[1]
    grids = {state: _grid(values, peak, f"{layer}, {state}") for state, values in cells.items()}
    return Pair(layer, peak, channels, grids["original"], grids.get("transformed"))


def _channels(name: str, metadata: Mapping[str, str]) -> int | None:
    """Width of the input, from the file's metadata."""
    known = json.loads(metadata.get("channels", "{}"))
    return known.get(name) if isinstance(known, dict) else None


def _grid(values: NDArray[np.float64], peak: float, what: str) -> Grid:
    share = np.sqrt(values / peak) if peak > 0 else np.zeros_like(values)
    codes = np.rint(share * _LARGEST).astype(np.uint8)
    rows, columns = values.shape
    largest = float(values.max(initial=0.0))
    median = float(np.median(values)) if values.size else 0.0
    spoken = f"{what}: largest magnitude {number(largest, 3)}, median cell {number(median, 3)}"
    return Grid(rows, columns, base64.b64encode(codes.tobytes()).decode(), largest, spoken)
