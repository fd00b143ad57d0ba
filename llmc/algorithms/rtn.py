"""Round-to-nearest: no data, no search. Also the last step of every recipe that only prepares the weights."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..quant import QuantSpec, quantize_weight, to_groups
from ..quant.affine import find_ranges, qparams
from .base import Algorithm, Needs, Options
from .stats import rounding_error
from .views import ClipRatios, LayerNote, SubsetView


class RTNOptions(Options):
    """RTN has no options."""


class RTN(Algorithm):
    """Each weight goes to the nearest grid point of its group's range, shrunk where a clip was handed over."""

    name = "RTN"
    kind = "quantizer"
    options_type: ClassVar[type[Options]] = RTNOptions
    works_without_grid = True

    def __init__(self, options: RTNOptions) -> None:
        self.options = options

    def needs(self, *, quant_out: bool | None) -> Needs:
        """No data; with ``quant_out`` the engine has nothing to calibrate either."""
        return Needs(data=False)

    def subset(self, view: SubsetView) -> None:
        """Round every Linear that has a grid."""
        round_subset(view)


def round_subset(view: SubsetView, why: str | None = None) -> None:
    """Round every Linear that has a grid to nearest, within the clip that was handed over, if any. The notes tell
    ``why`` nothing better was done."""
    for name, spec in view.specs.items():
        weight = view.linears[name].weight.detach()
        quantized = quantize_weight(weight, spec, clipped_qparams(weight, spec, view.clips.get(name)))
        view.put(name, quantized, LayerNote(rounding_error(weight, quantized), fallback=why))


def clipped_qparams(weight: Tensor, spec: QuantSpec, clip: ClipRatios | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[out, groups]`` of a weight's range, shrunk by a clip if there is one."""
    lo, hi = find_ranges(to_groups(weight, spec), spec)
    lo, hi = lo.squeeze(-1), hi.squeeze(-1)
    return qparams(lo, hi, spec) if clip is None else qparams(lo * clip.lo, hi * clip.hi, spec)
