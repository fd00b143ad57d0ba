"""Float grids of 8 and 4 bits, as the hardware has them: what saturates, where ties go, which scales are allowed.

FP8 is torch's own cast behind a clamp (the cast alone turns an overflow into NaN or infinity). FP4 is e2m1: 0, 0.5, 1,
1.5, 2, 3, 4, 6. The scales of MX formats (OCP Microscaling Formats 1.0) are powers of two, those of NVFP4 are e4m3
numbers over one float32 number for the whole tensor. Their rules are those of the compressed-tensors library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from .spec import Grid, PerTensor, QuantSpec

LARGEST: dict[str, float] = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}
"""The largest value of each float grid."""

_EMAX = {"e4m3": 8, "e5m2": 15, "e2m1": 2}  # floor(log2(LARGEST))
_CASTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_BIAS = 127  # the exponents of E8M0 are -127 ... 127


def nearest(values: Tensor, grid: Grid) -> Tensor:
    """The nearest value of a float grid, in float32; ties go to the even mantissa, what is too large saturates.

    Args:
        values: any shape and float dtype.
        grid: one of ``LARGEST``.
    """
    if grid in _CASTS:
        return widened(nearest_codes(values, grid))
    clamped = values.float().clamp(-LARGEST[grid], LARGEST[grid])
    magnitude = clamped.abs()
    # Neighbours are 0.5 apart below 2, 1 below 4, then 2. Half of an even number of steps is rounded to even.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round_() * step, clamped)


def nearest_codes(values: Tensor, grid: Grid) -> Tensor:
    """The same of ``e4m3`` or ``e5m2``, in that dtype."""
    return values.float().clamp(-LARGEST[grid], LARGEST[grid]).to(_CASTS[grid])


def widened(codes: Tensor) -> Tensor:
    """``codes.float()``. On a CPU torch converts 8-bit floats one by one; looking them up takes a fifth of the time."""
    if codes.dtype not in _CASTS.values() or codes.device.type != "cpu" or codes.requires_grad:
        return codes.float()
    index = codes.contiguous().view(torch.uint8).int()
    return torch.index_select(_values(codes.dtype), 0, index.view(-1)).view(codes.shape)


@cache
def _values(dtype: torch.dtype) -> Tensor:
    """What the 256 codes of an 8-bit float mean, in float32."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def scale_of(magnitude: Tensor, spec: QuantSpec) -> Tensor:
    """The scale that maps the largest magnitude of a group to the end of its float grid, in float32, not yet rounded.

    MX scales are powers of two already: ``2^(floor(log2 m) - emax)``, and the next power where ``m`` is beyond
    ``1.75 * 2^floor(log2 m)``, so that e2m1 doesn't cut the upper end (compressed-tensors' ``generate_mx_scales``; the
    OCP specification, section 6.3, leaves that step out).
    """
    if not spec.is_mx:
        return magnitude.float() / LARGEST[spec.grid]
    mantissa, exponent = torch.frexp(magnitude.float())  # m = mantissa * 2^exponent, mantissa in [0.5, 1)
    power = exponent - 1 + (mantissa >= 0.875).int() - _EMAX[spec.grid]
    scale = torch.exp2(power.clamp(-_BIAS, _BIAS).float())
    return torch.where(magnitude == 0, torch.ones_like(scale), scale)


def global_scale_of(magnitude: float) -> float:
    """NVFP4's global scale of a tensor with the largest magnitude ``magnitude``: ``448 * 6 / magnitude`` in float32.

    All group scales are multiplied by it before they are rounded to e4m3, and divided by it when they are used: the
    largest becomes 448. Some formats store it, others its reciprocal. So it's a number that its float32 reciprocal's
    reciprocal gives back, at most one digit beside the quotient.
    """
    largest = torch.tensor(magnitude, dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    scale = float((LARGEST["e4m3"] * LARGEST["e2m1"] / largest).reciprocal().reciprocal())
    return scale if scale < float("inf") else 1.0


def bind_global_scale(spec: QuantSpec, weights: Sequence[Tensor]) -> QuantSpec:
    """A spec with what Linears that a backend runs as one (q, k and v; gate and up) have in common.

    That is NVFP4's global scale, and the range of a float grid with one scale per tensor, of which a single tensor has
    its own. Any other spec stays as it is.

    Args:
        spec: the grid, bound to other tensors or not yet.
        weights: the tensors that are run as one.
    """
    if spec.is_nvfp4:
        return replace(spec, global_scale=global_scale_of(_largest(weights)))
    if spec.grid != "int" and isinstance(spec.granularity, PerTensor):
        return replace(spec, shared_range=_largest(weights) if len(weights) > 1 else None)
    return spec


def _largest(weights: Sequence[Tensor]) -> float:
    return max(float(weight.abs().max()) for weight in weights)
