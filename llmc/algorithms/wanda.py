"""Wanda (Sun et al., 2023): a weight counts as much as its magnitude times the norm of the input that it meets.

Score ``S_ij = |W_ij| * ||X_j||`` (equation 1 of the paper); in each row the lowest become zero. No weight changes
otherwise.
"""

from __future__ import annotations

from typing import ClassVar

from ..quant import prune_mask
from .base import Algorithm, Needs, Options
from .stats import relative_error
from .views import LayerNote, SubsetView


class WandaOptions(Options):
    """Wanda has no options."""


class Wanda(Algorithm):
    """Weights compete within their output channel; the norms are those of all calibration tokens."""

    name = "Wanda"
    kind = "pruner"
    options_type: ClassVar[type[Options]] = WandaOptions
    statistics = frozenset({"sum_squares"})

    def __init__(self, options: WandaOptions) -> None:
        self.options = options

    def needs(self, *, quant_out: bool | None) -> Needs:
        """As published, the pruned blocks' outputs calibrate the next one; within a block nothing waits for pruning."""
        return Needs(data=True, compressed_stream=True if quant_out is None else quant_out)

    def subset(self, view: SubsetView) -> None:
        """Prune every Linear that is to be pruned. The error noted takes channels for uncorrelated."""
        if view.stats.sum_squares is None:
            raise ValueError("Wanda needs the sum of squares of its inputs")
        norm, reached = view.stats.sum_squares.norm, view.stats.sum_squares.tokens > 0
        for name, sparsity in view.sparsity.items():
            weight = view.weight(name)
            scored = weight.abs().mul_(norm) if reached else weight.abs()
            mask = prune_mask(scored, sparsity, compare="row")
            error = relative_error(scored, scored.masked_fill(mask, 0), None)
            why = None if reached else "no calibration token reaches it: pruned by magnitude"
            view.prune(name, weight, mask, LayerNote(error, fallback=why))
