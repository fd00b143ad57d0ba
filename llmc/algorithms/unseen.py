"""Linears that no calibration token reached: what a step does to them without data."""

from __future__ import annotations

from dataclasses import replace

from .base import Algorithm
from .magnitude import Magnitude, MagnitudeOptions
from .rtn import round_subset
from .views import SubsetView

_WHY = "no calibration token reached it"


def treat_unseen(algorithm: Algorithm, view: SubsetView) -> None:
    """Round to nearest instead of quantizing, prune by magnitude instead of pruning; a transform changes nothing.

    The notes of the Linears say so.
    """
    if algorithm.kind == "quantizer":
        round_subset(view)
        why = f"{_WHY}: rounded to nearest"
    elif algorithm.kind == "pruner":
        Magnitude(MagnitudeOptions()).subset(view)
        why = f"{_WHY}: pruned by magnitude"
    else:
        return
    view.notes = {name: replace(note, fallback=why) for name, note in view.notes.items()}
