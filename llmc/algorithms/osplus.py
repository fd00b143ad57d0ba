"""Outlier Suppression+ (Wei et al., 2023): shift channels to their middle, then shrink only those that stick out.

The shift is ``z = (max x + min x) / 2`` (equation 2), absorbed by the norm's bias and the Linears' biases, where there
are any. The scale follows from one threshold ``t``: a channel whose extremes exceed it is shrunk to it (equation 7);
``t`` is searched by the error of the module that sees the effect, over all calibration tokens: first every tenth of the
authors' hundred, then those around the best.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from .base import Algorithm, Layers, Needs, Options
from .search import best_in_order, best_scale
from .views import SubsetView

_THRESHOLDS = 100
_STEP = 0.5  # largest distance between two of them, where they are evenly spaced
_LOWEST = 1.0


class OsPlusOptions(Options):
    """Options of Outlier Suppression+."""

    layers: Layers = None
    shift: bool | None = Field(
        default=None,
        description="Shift channels to the middle of their range; by default where the norm and the Linears have "
        "biases that can absorb it.",
    )
    search: Literal["coarse", "full"] = Field(
        default="coarse",
        description="coarse: every tenth threshold, then those around the best; full: every one on every token.",
    )


class OsPlus(Algorithm):
    """Channel-wise shifting and scaling. A transform: rounding is left to the step that follows."""

    name = "OsPlus"
    kind = "transform"
    options_type: ClassVar[type[Options]] = OsPlusOptions
    statistics = frozenset({"channel_range"})
    works_on = frozenset({"residual"})

    def __init__(self, options: OsPlusOptions) -> None:
        self.options = options
        self.layers = options.layers

    def needs(self, *, quant_out: bool | None) -> Needs:
        """The original model's activations calibrate it, unless ``quant_out`` asks otherwise."""
        return Needs(data=True, compressed_stream=bool(quant_out))

    def subset(self, view: SubsetView) -> None:
        """Find shift and scale of a subset that reads a norm."""
        found = view.stats.channel_range
        if found is None:
            raise ValueError("OS+ needs the range of each channel of its inputs")
        rule = view.scale_rule(allow_gqa=False)
        if rule is None or not view.fed_by_norm or not view.specs or found.tokens == 0:
            return
        shift = (found.hi + found.lo) / 2 if self.options.shift is not False and view.can_shift else None
        lo, hi = (found.lo, found.hi) if shift is None else (found.lo - shift, found.hi - shift)
        scales = candidates(lo, hi)
        full = self.options.search == "full"
        best = best_scale(view, scales, full=True, shift=shift) if full else best_in_order(view, scales, shift=shift)
        scale = scales[best]
        if shift is not None:
            view.fold_shift(shift)
        if shift is not None or not torch.equal(scale, torch.ones_like(scale)):
            view.fold_scale(scale, rule)


def candidates(lo: Tensor, hi: Tensor) -> list[Tensor]:
    """Scales ``[in]`` for channels of range ``[lo, hi]``, the identity first: one for each threshold, falling to 1.

    Thresholds are evenly spaced, as in the authors' code, up to a reach of 50. Beyond, that code makes more of them,
    one for each half: here there are as many as before, and their ratio is even.
    """
    reach = torch.maximum(-lo, hi)
    largest = float(reach.max())
    found = [torch.ones_like(reach)]
    if largest <= _LOWEST:
        return found
    thresholds = torch.linspace(largest, _LOWEST, _THRESHOLDS + 1)
    if largest > _STEP * _THRESHOLDS:
        thresholds = torch.logspace(math.log10(largest), math.log10(_LOWEST), _THRESHOLDS + 1)
    return found + [(reach / threshold).clamp(min=1) for threshold in thresholds[1:]]
