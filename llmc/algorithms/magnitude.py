"""Magnitude pruning: the smallest weights of each Linear become zero. What every other pruner must beat."""

from __future__ import annotations

from typing import ClassVar

from ..quant import prune_mask
from .base import Algorithm, Needs, Options
from .stats import relative_error
from .views import LayerNote, SubsetView


class MagnitudeOptions(Options):
    """Magnitude has no options."""


class Magnitude(Algorithm):
    """All weights of a Linear compete with one another (with a pattern, those of each run)."""

    name = "Magnitude"
    kind = "pruner"
    options_type: ClassVar[type[Options]] = MagnitudeOptions

    def __init__(self, options: MagnitudeOptions) -> None:
        self.options = options

    def needs(self, *, quant_out: bool | None) -> Needs:
        """No data."""
        return Needs(data=False)

    def subset(self, view: SubsetView) -> None:
        """Prune every Linear that is to be pruned."""
        for name, sparsity in view.sparsity.items():
            weight = view.weight(name)
            mask = prune_mask(weight.abs(), sparsity, compare="all")
            view.prune(name, weight, mask, LayerNote(relative_error(weight, weight.masked_fill(mask, 0), None)))
