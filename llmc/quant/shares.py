"""How many values a grid can't express, and how many it makes 0."""

from __future__ import annotations

from torch import Tensor

from .activations import ActSpec, InputRange, static_qparams
from .floats import LARGEST, widened
from .groups import over_rows
from .qweight import QWeight
from .spec import PerBlock, QuantSpec

_LAST_STEP = {"e4m3": 32.0, "e5m2": 8192.0, "e2m1": 2.0}
"""Between the two largest values of each float grid."""


def clipped_share(weight: Tensor, quantized: QWeight) -> float:
    """The share of the values of ``[out, in]`` that lie beyond the ends of their grid by more than half of its last
    step: those that rounding alone doesn't bring there."""
    beyond = (_beyond(_in_codes(weight[rows], part), part.spec) for rows, part in quantized.strips())
    return sum(int(one.count_nonzero()) for one in beyond) / weight.numel()


def zero_share(quantized: QWeight) -> float:
    """The share of the weights that the codes make 0."""
    others = 0
    for _, part in quantized.strips():
        codes = widened(part.codes)
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
    scale = quantized.scale.float()
    if quantized.spec.global_scale is not None:
        scale = scale / scale.new_tensor(quantized.spec.global_scale)
    codes = weight.float() / _spread(scale, quantized)
    return codes if quantized.zero is None else codes + _spread(quantized.zero.float(), quantized)


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
