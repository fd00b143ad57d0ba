"""Calibrated ranges of a block by the names that a format stores them under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..models import Subset
from ..quant import InputRange, KvRanges, KvSpec, cache_scales
from .block_subsets import BlockSubsets
from .parts import Unit
from .stored import StoredBlock


def input_ranges(
    units: Sequence[Unit], found: Mapping[str, InputRange], own: BlockSubsets, weights: StoredBlock
) -> dict[str, InputRange]:
    """Those of inputs by the checkpoint's names of the Linears; ``found`` has them by the subsets' keys."""
    return {
        weights.module(name): found[unit.subset.key]
        for unit in units
        for name in unit.subset.linears
        if unit.subset.key in found and own.scheme_of(name).act is not None
    }


def stored_cache_scales(
    subsets: Sequence[Subset], kv: KvSpec | None, ranges: KvRanges | None, weights: StoredBlock
) -> dict[str, Tensor]:
    """Those of a static KV cache, under the checkpoint's name of the attention module."""
    if kv is None or ranges is None:
        return {}
    linear = next(subset.linears[0] for subset in subsets if subset.reads == "heads")
    attention = weights.module(linear).rpartition(".")[0]
    return {f"{attention}.{name}": scale for name, scale in cache_scales(kv, ranges).items()}
