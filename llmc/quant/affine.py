"""Scales and zero points, codes, and back, on integer and float grids.

Weights are seen as ``[rows, groups, group]``: every group of every row has its own scale, rounded to its stored dtype
before a code is computed. Arithmetic is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .floats import bind_global_scale, nearest, nearest_codes, scale_of
from .groups import from_groups, group_strips, to_groups
from .qweight import QWeight
from .spec import MinMax, Mse, QuantSpec


def qparams(lo: Tensor, hi: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ranges ``[lo, hi]``, any shape; both are float32 holding the values as they are stored.

    Asymmetric ranges are made to include 0, else the zero point is clamped and the far end is cut. A range without
    extent gets scale 1: its codes are 0 whatever the scale.
    """
    lo, hi = lo.float().clamp(max=0), hi.float().clamp(min=0)
    levels = spec.qmax - spec.qmin
    if spec.grid != "int":
        found = torch.maximum(-lo, hi)
        scale = scale_of(found if spec.shared_range is None else torch.full_like(found, spec.shared_range), spec)
    elif not spec.symmetric:
        scale = (hi - lo) / levels
    elif spec.sym_mode == "full":
        # The signed value of larger magnitude lands on qmin = -2^(b-1) exactly.
        scale = torch.where(-lo >= hi, lo, hi) / spec.qmin
    else:
        magnitude = torch.maximum(-lo, hi)
        scale = magnitude / spec.qmax if spec.sym_mode == "restricted" else 2 * magnitude / levels
    scale = store_scale(scale, spec)
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (spec.qmin - (lo / scale).round()).clamp(spec.qmin, spec.qmax)


def store(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a scale to its stored dtype and return it as float32; 0 and NaN, which can't divide, become 1."""
    largest = torch.finfo(dtype).max
    rounded = scale.clamp(-largest, largest).to(dtype).float()
    return torch.where((rounded == 0) | rounded.isnan(), torch.ones_like(rounded), rounded)


def store_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Round scales as the spec stores them, and return them as float32.

    Raises:
        ValueError: an NVFP4 spec without its global scale.
    """
    if not spec.is_nvfp4:
        return store(_significant(scale, spec.scale_digits), spec.scale_dtype)
    if spec.global_scale is None:
        raise ValueError("bind NVFP4 to a tensor first: it has no global scale")
    # A tensor on the scales' device: dividing by a number would multiply by its reciprocal on a GPU.
    whole = scale.new_tensor(spec.global_scale)
    return store(scale * whole, spec.scale_dtype) / whole


def _significant(scale: Tensor, digits: int | None) -> Tensor:
    """Keep so many significant binary digits; ties go to the even one."""
    if digits is None:
        return scale
    mantissa, exponent = torch.frexp(scale.float())
    return torch.ldexp(torch.round(mantissa * 2**digits) / 2**digits, exponent)


def quantize(values: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of ``values`` as float32; ``scale`` and ``zero`` broadcast against them. Rounds half to even.

    The codes of a float grid are its values.
    """
    if spec.grid != "int":
        return nearest(values.float() / scale, spec.grid)
    return (values.float() / scale).round_().add_(zero).clamp_(spec.qmin, spec.qmax)


def _codes(values: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """The same as they are stored."""
    if spec.grid in ("e4m3", "e5m2"):
        return nearest_codes(values.float() / scale, spec.grid)
    return quantize(values, scale, zero, spec).to(spec.code_dtype)


def fake_quantize(values: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """``(codes - zero) * scale``: the values that the grid can express, in float32."""
    return quantize(values, scale, zero, spec).sub_(zero).mul_(scale)


def find_ranges(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Range ``(lo, hi)``, each ``[..., 1]``, of groups ``[..., group]`` by the spec's estimator."""
    lo = groups.amin(-1, keepdim=True).float().clamp(max=0)
    hi = groups.amax(-1, keepdim=True).float().clamp(min=0)
    if isinstance(spec.ranges, MinMax):
        return lo, hi
    return _search_mse(groups.float(), lo, hi, spec, spec.ranges)


def _search_mse(groups: Tensor, lo: Tensor, hi: Tensor, spec: QuantSpec, search: Mse) -> tuple[Tensor, Tensor]:
    best = torch.full_like(lo, torch.inf)
    best_lo, best_hi = lo.clone(), hi.clone()
    for step in range(round(search.max_shrink * search.grid)):
        shrink = 1 - step / search.grid
        scale, zero = qparams(lo * shrink, hi * shrink, spec)
        error = fake_quantize(groups, scale, zero, spec).sub_(groups).abs_().pow_(search.norm).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_lo, best_hi = torch.where(better, lo * shrink, best_lo), torch.where(better, hi * shrink, best_hi)
    return best_lo, best_hi


def group_qparams(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[out, groups]`` of a weight ``[out, in]`` (per tensor: ``[1, 1]``; blocks: one each)."""
    scale, zero = qparams(*find_ranges(to_groups(weight, spec), spec), spec)
    return scale.squeeze(-1), zero.squeeze(-1)


def fake_quantize_weight(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Round-to-nearest of ``[out, in]``, in float32: what a search compares. It isn't rounded to the scales' dtype.

    NVFP4 without a global scale gets that of this weight.
    """
    if spec.is_nvfp4 and spec.global_scale is None:
        spec = bind_global_scale(spec, [weight])
    groups = to_groups(weight, spec)
    rounded = fake_quantize(groups, *qparams(*find_ranges(groups, spec), spec), spec)
    return from_groups(rounded, weight.shape, spec)


def quantize_weight(weight: Tensor, spec: QuantSpec, qparams_: tuple[Tensor, Tensor] | None = None) -> QWeight:
    """Round-to-nearest of a weight ``[out, in]``.

    Args:
        weight: any float dtype.
        spec: the grid. NVFP4 without a global scale gets that of this weight.
        qparams_: scale and zero point ``[out, groups]``, if they were found elsewhere (clipping).
    """
    if spec.is_nvfp4 and spec.global_scale is None:
        spec = bind_global_scale(spec, [weight])
    scale, zero = group_qparams(weight, spec) if qparams_ is None else qparams_
    codes = torch.empty(weight.shape, dtype=spec.code_dtype, device=weight.device)
    for rows, own in group_strips(weight, spec):
        part = weight[rows]
        found = _codes(to_groups(part, spec), scale[own, :, None], zero[own, :, None], spec)
        codes[rows] = from_groups(found, part.shape, spec)
    return QWeight.from_float(codes, scale, zero, spec)
