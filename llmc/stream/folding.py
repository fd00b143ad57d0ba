"""Folds the scale and shift that a transform has chosen for a subset's input into the operation in front of it."""

from __future__ import annotations

from ..algorithms import SubsetView
from ..models import fold_scale, fold_shift
from ..models.experts import working_on
from .stored import StoredBlock
from .visits import Visits


def fold(view: SubsetView, visits: Visits, weights: StoredBlock) -> tuple[float, float] | None:
    """Change a block by what a view asks for, in place; experts' weights one after the other.

    Args:
        view: the subset.
        visits: brings its experts.
        weights: the block.

    Returns:
        The smallest and the largest scale; None if nothing was asked for.
    """
    if view.scale is None or view.prev is None:
        return None
    (scale, rule), linears, prev = view.scale, list(view.linears.values()), view.subset.prev
    readers = [*linears, *map(weights.block.get_submodule, view.subset.also)]
    with working_on(weights.block, [view.prev]):
        if view.shift is not None:
            fold_shift(view.prev, visits.one_by_one(linears), view.shift, weights.dtype(f"{prev}.bias"))
        fold_scale(view.prev, visits.one_by_one(readers), scale, rule, weights.dtype(f"{prev}.weight"))
    return float(scale.min()), float(scale.max())
