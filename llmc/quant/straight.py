"""Rounding that gradients pass straight through, for methods that learn.

Rounding has no useful derivative. The straight-through estimator (Bengio et al., 2013) takes it for the identity and
keeps what else depends on scales and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .affine import qparams
from .groups import from_groups, to_groups
from .spec import QuantSpec
from .strips import strips


class _FakeQuantize(torch.autograd.Function):
    """``s (c - z)`` with the code ``c = clamp(round(w / s) + z)``, in the dtypes that a stored weight goes through.

    Where the clamp doesn't bite, ``d/dw = 1`` and ``d/ds = c - z - w / s``; elsewhere ``d/dw = 0`` and
    ``d/ds = c - z``. The zero point is a constant, and so are the roundings to 16 bits. Slopes are found on the way
    forward, where most of what they're made of is at hand.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
        ratio = values / scale
        unbounded = ratio.round().add_(zero)
        codes = unbounded.clamp(spec.qmin, spec.qmax)
        if any(ctx.needs_input_grad):
            inside = unbounded.eq_(codes)  # 1 or 0
            codes.sub_(zero)
            ctx.save_for_backward(inside if ctx.needs_input_grad[0] else None, codes - ratio.mul_(inside))
        else:
            codes.sub_(zero)
        return codes.mul_(scale).to(spec.product_dtype).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, slope = ctx.saved_tensors
        grad = grads[0].float()
        of_values = grad * inside if ctx.needs_input_grad[0] else None
        of_scale = (grad * slope).sum(-1, keepdim=True) if ctx.needs_input_grad[1] else None
        return of_values, of_scale, None, None, None


class _Extremes(torch.autograd.Function):
    """The least and the largest of each of ``[out, groups, group]``; where several are equal, they share a gradient.

    torch's own gradient counts the equal ones as 64-bit integers, which takes several times as long.
    """

    @staticmethod
    def forward(ctx: Any, groups: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = groups.amin(-1), groups.amax(-1)
        ctx.save_for_backward(groups, lo, hi)
        return lo, hi

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        groups, *ends = ctx.saved_tensors
        total = torch.zeros_like(groups)
        for rows in strips(groups.flatten(1)):
            equal = torch.empty_like(groups[rows])
            for end, grad in zip(ends, grads, strict=True):
                torch.eq(groups[rows], end[rows, :, None], out=equal)  # 1 or 0
                total[rows].addcmul_(equal, (grad[rows] / equal.sum(-1))[..., None])
        return total


def clipped_weight(weight: Tensor, spec: QuantSpec, lo_ratio: Tensor, hi_ratio: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight rounded to nearest in shrunken min-max ranges, as ``QWeight.dequantize`` would return it.

    Gradients reach the ratios and the weight, both through the codes and through the extremes that the ranges are of.

    Args:
        weight: ``[out, in]`` float32.
        spec: an integer grid.
        lo_ratio: ``[out, groups]`` float32, by how much the lower end of each range shrinks.
        hi_ratio: the same of the upper end.
        dtype: of the result.
    """
    groups = to_groups(weight, spec)
    lo, hi = _Extremes.apply(groups)  # type: ignore[no-untyped-call]
    scale, zero = qparams(lo.clamp(max=0) * lo_ratio, hi.clamp(min=0) * hi_ratio, spec)
    rounded: Tensor = _FakeQuantize.apply(groups, scale[..., None], zero[..., None], spec, dtype)  # type: ignore[no-untyped-call]
    return from_groups(rounded, weight.shape, spec)


def straight_through(inputs: Tensor, rounded: Tensor) -> Tensor:
    """``rounded`` to whoever looks at the values, ``inputs`` to the gradient; both ``[..., in]`` of one dtype."""
    return _Identity.apply(inputs, rounded)  # type: ignore[no-any-return, no-untyped-call]


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
