"""Activations are quantized on the way into a Linear, as the backends do it: pure functions of a tensor and a spec.

Dynamic scales are found on each input: one for each token, for each group of channels of a token, or for the whole
tensor. Static ones come from a range that calibration found. Scales are float32 numbers, which is what vLLM's kernels
keep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .affine import fake_quantize, fake_quantize_weight, qparams
from .floats import global_scale_of
from .observers import Observer
from .spec import PerCluster, PerGroup, PerTensor, PerToken, QuantSpec


@dataclass(frozen=True)
class InputRange:
    """What calibration found for one shared input: two float32 numbers."""

    lo: float
    hi: float

    @property
    def magnitude(self) -> float:
        """The larger of its ends' magnitudes, of which NVFP4's global scale is."""
        return max(-self.lo, self.hi)


@dataclass(frozen=True)
class ActSpec:
    """How the inputs of Linears are quantized.

    Attributes:
        grid: the grid of ``[tokens, in]``: per token, per group or per tensor; per cluster it is that of tensors
            inside a block, whose static ranges a method finds that clusters channels.
        observer: how a static range is found; None: scales are dynamic. NVFP4 has dynamic group scales over a static
            global scale, so it has an observer.

    Raises:
        ValueError: a static grid finer than the tensor, or NVFP4 without an observer.
    """

    grid: QuantSpec
    observer: Observer | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.grid.granularity, PerToken | PerGroup | PerTensor | PerCluster):
            raise ValueError("activations share scales per token, group, tensor or cluster")
        whole = isinstance(self.grid.granularity, PerTensor)  # may be either
        if not whole and self.grid.is_nvfp4 != (self.observer is not None):
            raise ValueError("static ranges are those of a tensor, or NVFP4's global scale")

    def describe(self) -> str:
        """A short name such as ``A8 token sym`` or ``A8 tensor sym static``."""
        static = self.observer is not None and not self.grid.is_nvfp4
        return self.grid.describe("A") + (" static" if static else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``metrics.json``."""
        observer = None if self.observer is None else {"kind": type(self.observer).__name__, **vars(self.observer)}
        return {**self.grid.to_dict(), "static": observer}


def static_qparams(found: InputRange, grid: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a calibrated range, float32, each ``[1]``."""
    return qparams(torch.tensor([found.lo]), torch.tensor([found.hi]), grid)


def fake_quantize_inputs(inputs: Tensor, spec: ActSpec, found: InputRange | None = None) -> Tensor:
    """Round inputs ``[..., in]`` to the grid and return them in their own dtype, computed in float32.

    Args:
        inputs: any float dtype.
        spec: the grid.
        found: the calibrated range of a static grid, or of NVFP4.

    Raises:
        ValueError: a static grid without a range, or a group size that doesn't divide the channels.
    """
    grid = spec.grid
    if spec.observer is not None:
        if found is None:
            raise ValueError(f"{spec.describe()} needs a calibrated range")
        if not grid.is_nvfp4:
            scale, zero = (part.to(inputs.device) for part in static_qparams(found, grid))
            return fake_quantize(inputs, scale, zero, grid).to(inputs.dtype)
        grid = replace(grid, global_scale=global_scale_of(found.magnitude))
    tokens = inputs.reshape(-1, inputs.shape[-1])
    return fake_quantize_weight(tokens, grid).reshape(inputs.shape).to(inputs.dtype)
