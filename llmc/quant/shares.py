"""How many values a grid can't express, and how many it makes 0."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import ActSpec, InputRange, static_qparams
from .floats import LARGEST
from .groups import over_rows, to_groups
from .qweight import QWeight
from .spec import PerBlock, QuantSpec

_LAST_STEP = {"e4m3": 32.0, "e5m2": 8192.0, "e2m1": 2.0}
"""Between the two largest values of each float grid."""


def clipped_share(weight: Tensor, quantized: QWeight) -> float:
    """The share of the values of ``[out, in]`` that lie beyond the ends of their grid by more than half of its last
    step: those that rounding alone doesn't bring there."""
    return sum(_clipped(weight[rows], part) for rows, part in quantized.strips()) / weight.numel()


def _clipped(weight: Tensor, quantized: QWeight) -> int:
    """How many values of a strip."""
    if quantized.group_index is None:
        # Mostly none: the ends of the groups tell it, without dividing each value by its scale.
        groups = to_groups(weight, quantized.spec)
        if not any(int(_beyond(end, quantized.spec).count_nonzero()) for end in _group_ends(groups, quantized)):
            return 0
    return int(_beyond(_in_codes(weight, quantized), quantized.spec).count_nonzero())


def _group_ends(groups: Tensor, quantized: QWeight) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each group, in steps of the grid."""
    scale, zero = _qparams(quantized)
    return groups.amin(-1).float() / scale + zero, groups.amax(-1).float() / scale + zero


def zero_share(quantized: QWeight) -> float:
    """The share of the weights that the codes make 0."""
    others = 0
    for _, part in quantized.strips():
        # Floats as bytes without their sign: whatever isn't +0 or -0 isn't 0.
        codes = part.codes if part.spec.grid == "int" else part.codes.view(torch.uint8) & 0x7F
        others += int((codes if part.zero is None else codes != _spread(part.zero, part)).count_nonzero())
    return 1 - others / quantized.codes.numel()


def clipped_inputs(inputs: Tensor, spec: ActSpec, found: InputRange) -> Tensor:
    """Which values of ``[..., in]`` lie beyond a static range, bool: by more than half a step, as of weights; of NVFP4,
    those larger than what its global scale was made for."""
    values = inputs.float()
    if spec.grid.is_nvfp4:
        return values.abs() > found.magnitude
    scale, zero = (part.to(inputs.device) for part in static_qparams(found, spec.grid))
    return _beyond(values / scale + zero, spec.grid)


def _beyond(codes: Tensor, spec: QuantSpec) -> Tensor:
    if spec.grid == "int":
        return (codes > spec.qmax + 0.5) | (codes < spec.qmin - 0.5)
    return codes.abs() > LARGEST[spec.grid] + _LAST_STEP[spec.grid] / 2


def _in_codes(weight: Tensor, quantized: QWeight) -> Tensor:
    """A weight in steps of its grid, before rounding, ``[out, in]`` float32."""
    scale, zero = _qparams(quantized)
    codes = weight.float() / _spread(scale, quantized)
    return codes if quantized.zero is None else codes + _spread(zero, quantized)


def _qparams(quantized: QWeight) -> tuple[Tensor, Tensor]:
    """Scales and zero points ``[out, groups]``, float32."""
    scale = quantized.scale.float()
    if quantized.spec.global_scale is not None:
        scale = scale / scale.new_tensor(quantized.spec.global_scale)
    return scale, torch.zeros_like(scale) if quantized.zero is None else quantized.zero.float()


def _spread(qparam: Tensor, quantized: QWeight) -> Tensor:
    """Scales or zero points ``[out, groups]``, one for each weight, ``[out, in]``."""
    if quantized.group_index is not None:
        return qparam[:, quantized.group_index.long()]
    shape, spec = quantized.codes.shape, quantized.spec
    if isinstance(spec.granularity, PerBlock):
        return over_rows(qparam, shape, spec).repeat_interleave(spec.granularity.size, dim=1)[:, : shape[1]]
    if qparam.shape[1] == 1:
        return qparam.expand(shape)
    return qparam.repeat_interleave(shape[1] // qparam.shape[1], dim=1)
