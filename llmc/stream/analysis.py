"""Looks at a sample of tokens on its way through each block: what the Linears read, how far compressed ones are off.

The sample has two streams of its own, of the original and of the compressed model, so that what is found depends
neither on the streams that a method calibrates on, nor on how the block is run for it, nor on where an interrupted run
went on; and nothing that a method sees, or a format stores, depends on the sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms import LayerNote, Online, Statistics, SubsetView, new_statistics
from ..analysis import InputProfile, surface
from ..models import Subset
from ..models.experts import LinearExperts
from ..quant import ActSpec, ClusterQuantizer, InputRange, clipped_inputs, fake_quantize_inputs
from .batch import Batch
from .layer_numbers import ReadInputs, layer_numbers
from .parts import Unit, solved_units, watched_modules
from .stages import BlockRun, Observed, Stage, propagate, run_together
from .surfaces import write_block

ORIGINAL, COMPRESSED = "analysis.pretrain", "analysis.fake_quant"
"""Names of the sample's streams."""


@dataclass(frozen=True)
class AnalysisPlan:
    """What is looked at.

    Attributes:
        batches: the sample; empty: weights alone.
        surfaces: the blocks whose inputs are drawn.
        folder: where these are kept until the end of the run; None: nowhere.
    """

    batches: Sequence[Batch] = ()
    surfaces: frozenset[int] = frozenset()
    folder: Path | None = None


@dataclass(frozen=True)
class Seen:
    """What a unit's Linears read of the sample, ``[tokens, in]`` in pieces.

    Attributes:
        parts: of each part (an expert's share, or the one that there is).
        whole: of all parts; a token that several experts read is there several times.
    """

    parts: tuple[list[Tensor], ...]
    whole: list[Tensor]


@dataclass
class BlockAnalysis:
    """What is found of one block.

    Attributes:
        plan: what is looked at.
        index: the block's number.
        subsets: its subsets.
        online: what runs with the changed model.
        original: the block on the original's stream; None without a sample.
        compressed: the same on the compressed model's.
        layers: numbers of each compressed Linear by its name in the block.
    """

    plan: AnalysisPlan
    index: int
    subsets: tuple[Subset, ...]
    online: Online
    original: BlockRun | None
    compressed: BlockRun | None
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    _profiles: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    _surfaces: dict[str, Tensor] = field(default_factory=dict)
    _seen: dict[str, Seen] = field(default_factory=dict)

    def pass_original(self, *, looking: bool) -> None:
        """Bring the original's stream behind the block, which still has its own weights."""
        if self.original is None:
            return
        if not looking:
            propagate(self.original)
            return
        for key, seen in look(self.original, self.subsets, Online(), keep=True).items():
            self._profiles[key] = _profile(seen.whole)
            self._draw(key, seen, "original")

    def look(self) -> None:
        """See what the Linears of the transformed block read, in front of a step that makes other weights of theirs."""
        if self.compressed is not None:
            self._seen = look(self.compressed, self.subsets, self.online, keep=False)

    def compare(
        self,
        unit: Unit,
        observed: Sequence[Observed],
        views: Sequence[SubsetView],
        found: InputRange | None,
        *,
        rounds: bool,
    ) -> None:
        """Compare what a step has delivered for some parts of a unit with the weights, which the Linears still hold.

        Args:
            unit: the subset.
            observed: which parts.
            views: theirs, with results.
            found: the calibrated range of their input, if it is static.
            rounds: whether the input will be rounded behind this step, by the grid that the views tell.
        """
        for one, view in zip(observed, views, strict=True):
            seen = self._seen.get(unit.subset.key)
            pieces = [] if seen is None else [piece for piece in seen.parts[one.part] if piece.numel()]
            read = ReadInputs(pieces, _rounded(pieces, view, found) if rounds else pieces)
            for name in {**view.weights, **view.quantized}:
                own = ReadInputs(pieces, pieces) if name in view.unrounded else read
                self.layers[name] = layer_numbers(name, view, own)

    def activations(self, static: Mapping[str, tuple[ActSpec, InputRange]]) -> dict[str, Any]:
        """What was found of each subset's input by its key, given the ranges that were calibrated. Forgets the sample's
        inputs."""
        rows: dict[str, Any] = {}
        for key in {**self._profiles, **self._seen}:
            seen = self._seen.pop(key, None)
            transformed = None if seen is None else _profile(seen.whole)
            if seen is not None and transformed is not None and key in static:
                beyond = torch.cat([clipped_inputs(piece, *static[key]).flatten() for piece in seen.whole])
                transformed["clipped"] = float(beyond.double().mean())
            if seen is not None:
                self._draw(key, seen, "transformed")
            rows[key] = {"original": self._profiles.get(key), "transformed": transformed}
        return rows

    def pass_compressed(self) -> None:
        """Bring the compressed model's stream behind the block, which is what was written of it."""
        if self.compressed is not None:
            propagate(self.compressed)

    def keep_surfaces(self, names: Mapping[str, str]) -> None:
        """Write them where they stay until the end of the run, by the full names of the Linears."""
        if self._surfaces and self.plan.folder is not None:
            write_block(self.plan.folder, self.index, self._surfaces, names)

    def rows(self, notes: Mapping[str, LayerNote]) -> dict[str, dict[str, Any]]:
        """What the journal has of each Linear: the note of the step that made it, and what was found here."""
        return {name: note.to_dict() | self.layers.get(name, {}) for name, note in notes.items()}

    def _draw(self, key: str, seen: Seen, state: str) -> None:
        """The first Linear stands for all that read an input; what each expert reads isn't drawn."""
        subset = next(unit.subset for unit in solved_units(self.subsets) if unit.subset.key == key)
        if self.index in self.plan.surfaces and subset.experts is None and seen.whole:
            self._surfaces[f"{subset.linears[0]}|{state}"] = surface(torch.cat(seen.whole))


def look(run: BlockRun, subsets: Sequence[Subset], online: Online, *, keep: bool) -> dict[str, Seen]:
    """What each unit of a block reads, by its subset's key, from one forward of the block as it is; behind a rotation
    that runs with the model and in front of the rounding.

    Args:
        run: the block with the sample.
        subsets: of the block.
        online: what runs with the model.
        keep: store the outputs over the inputs.
    """
    units, seen = solved_units(subsets), dict[str, Seen]()

    def note(position: int, observed: Sequence[Observed]) -> None:
        parts = tuple(_pieces(one.statistics) for one in observed)
        pooled = observed[0].pooled
        seen[units[position].subset.key] = Seen(parts, parts[0] if pooled is None else _pieces(pooled))

    make = partial(new_statistics, ("sample",), 0, run.device)
    stages = [
        Stage(
            watched_modules(run.block, unit),
            None,
            make,
            online.of_input(unit.subset),
            experts=unit.experts,
            together=len(unit.parts),
        )
        for unit in units
    ]
    with run.attention(), _routed(run.block):
        run_together(run, stages, note, keep=keep)
    return seen


def _pieces(statistics: Statistics) -> list[Tensor]:
    return [] if statistics.sample is None else statistics.sample.pieces


def _profile(pieces: Sequence[Tensor]) -> dict[str, Any] | None:
    profile = InputProfile()
    for piece in pieces:
        profile.update(piece)
    found = profile.to_dict()
    return None if found is None else {**found, "clipped": None}


def _rounded(pieces: Sequence[Tensor], view: SubsetView, found: InputRange | None) -> Sequence[Tensor]:
    """The inputs as they will be rounded."""
    grid = view.clusters.get("input")
    if grid is not None and grid.bits is not None and pieces:
        quantizer = ClusterQuantizer(grid, pieces[0].device)
        return [quantizer(piece) for piece in pieces]
    if view.act is None:
        return pieces
    return [fake_quantize_inputs(piece, view.act, found) for piece in pieces]


@contextmanager
def _routed(block: nn.Module) -> Iterator[None]:
    """Within the context every expert is shown the tokens that are routed to it, however it is calibrated."""
    every = [module for module in block.modules() if isinstance(module, LinearExperts)]
    before = [module.all_tokens for module in every]
    try:
        for module in every:
            module.all_tokens = False
        yield
    finally:
        for module, value in zip(every, before, strict=True):
            module.all_tokens = value
