"""Weights that a family stores transposed, or those of all experts in one tensor, as Linears ``[out, in]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.layouts import StoredLayout
from ..decoding import Decoded, DenseEntry, Entry, Stage


@dataclass(frozen=True)
class _Split:
    """The views of a tensor, in memory of their own."""

    layout: StoredLayout
    source: str

    def __call__(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = self.layout.split(self.source, stored[self.source]) or {}
        return {name: part.clone(memory_format=torch.contiguous_format) for name, part in parts.items()}


def layout_stage(entries: Mapping[str, Entry], layout: StoredLayout) -> Stage:
    """What a layout's ``split`` finds in the tensors of these shapes."""
    decoded = []
    for name, entry in entries.items():
        parts = layout.split(name, torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
        if parts is not None:
            made = tuple(DenseEntry(own, entry.dtype, tuple(part.shape)) for own, part in parts.items())
            decoded.append(Decoded(made, (name,), _Split(layout, name)))
    return Stage(tuple(decoded))
