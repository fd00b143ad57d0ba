"""Surfaces of inputs: kept block by block in a run's state, put together at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .files import write_bytes, write_tensors

_PREFIX = "surfaces-"


def write_block(folder: Path, index: int, surfaces: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Keep those of a block.

    Args:
        folder: the run's state.
        index: the block's number.
        surfaces: by the Linear's name in the block, ``|`` and the state.
        names: the Linears' full names by those in the block.
    """
    full = {f"{names[(name := key.partition('|'))[0]]}|{name[2]}": tensor for key, tensor in surfaces.items()}
    write_tensors(folder / f"{_PREFIX}{index}.safetensors", full)


def gather_surfaces(folder: Path, target: Path, tokens: int, channels: Mapping[str, int]) -> bool:
    """Write all that were kept into one file, whole or not at all; whether there were any.

    Args:
        folder: the run's state.
        target: the file.
        tokens: of the sample.
        channels: how many input channels each Linear has, by its full name.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob(f"{_PREFIX}*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if not tensors:
        return False
    widths = {name: channels[name.rpartition("|")[0]] for name in sorted(tensors)}
    metadata = {"channels": json.dumps(widths), "format": "pt", "tokens": str(tokens)}
    write_bytes(target, _ordered(save(tensors, metadata)))
    return True


def _ordered(content: bytes) -> bytes:
    """A safetensors file with the entries of its header in order: safetensors writes the metadata in another order each
    time, and the same run is to write the same bytes."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]
