"""Which schemes TensorRT-LLM loads from ModelOpt's unified checkpoints, and what it calls them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ExportError
from ..quant import ActSpec, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Scheme
from . import modelopt_layouts as modelopt
from .modelopt_layouts import Algorithm


def algorithm_of(scheme: Scheme) -> Algorithm:
    """TensorRT-LLM's algorithm for a scheme.

    Raises:
        ExportError: there is none; the remedy names the nearest schemes that have one.
    """
    spec = need_weight(scheme)
    found = _integers(spec, scheme.act) if spec.grid == "int" else _floats(spec, scheme.act)
    if found is None:
        raise ExportError(
            f"TensorRT-LLM has no method for {scheme.describe()} (save_trtllm)",
            f"the nearest that it has: {_nearest(spec)}; or write save_fake, which it loads as it is (weights only)",
        )
    _check_scales(spec, found)
    return found


def conditions(schemes: Sequence[Scheme]) -> list[str]:
    """What the backend does otherwise than the evaluation."""
    if all(algorithm_of(scheme) is not modelopt.W4A8 for scheme in schemes):
        return []
    return [
        "save_trtllm: TensorRT-LLM multiplies W4A8_AWQ in FP8, so it may round the products of codes and scales to "
        "e4m3, which the evaluation doesn't"
    ]


def need_weight(scheme: Scheme) -> QuantSpec:
    """The weight's grid of a quantized Linear."""
    if scheme.weight is None:
        raise ValueError("a Linear that isn't quantized has no algorithm")
    return scheme.weight


def _integers(spec: QuantSpec, act: ActSpec | None) -> Algorithm | None:
    if not spec.symmetric:
        return None
    if spec.bits == 8 and act is None and isinstance(spec.granularity, PerChannel):
        return modelopt.W8A16
    if spec.bits == 4 and spec.granularity == PerGroup(modelopt.W4A16.group or 0):
        if act is None:
            return modelopt.W4A16
        return modelopt.W4A8 if _static_fp8(act) else None
    return None


def _floats(spec: QuantSpec, act: ActSpec | None) -> Algorithm | None:
    if act is None:
        return None
    if spec.is_nvfp4 and act.grid.is_nvfp4:
        return modelopt.NVFP4
    if spec.grid != "e4m3" or spec.is_mx or act.grid.grid != "e4m3" or act.grid.is_mx:
        return None
    if isinstance(spec.granularity, PerTensor) and _static_fp8(act):
        return modelopt.FP8
    rows = isinstance(spec.granularity, PerChannel) and isinstance(act.grid.granularity, PerToken)
    return modelopt.FP8_ROWS if rows else None


def _static_fp8(act: ActSpec) -> bool:
    return act.grid.grid == "e4m3" and isinstance(act.grid.granularity, PerTensor) and act.observer is not None


def _nearest(spec: QuantSpec) -> str:
    if spec.grid == "int":
        return (
            "weight {bit: 4, symmetric: True, per_group, group_size: 128}, alone or with act {bit: e4m3, per_tensor, "
            "static: True}; or {bit: 8, symmetric: True, per_channel} alone"
        )
    if spec.grid == "e2m1":
        return "weight {bit: nvfp4} with act {bit: nvfp4}"
    return "weight {bit: e4m3, per_channel} with act {bit: e4m3, per_token}, or both per_tensor with act static: True"


def _check_scales(spec: QuantSpec, algorithm: Algorithm) -> None:
    """All scales are stored in float32; those of packed integers are cast to 16 bits as they're loaded."""
    narrow = spec.grid == "int"
    if not spec.is_nvfp4 and narrow == (spec.scale_dtype == torch.float32):
        kept = "the model's 16 bits" if narrow else "float32"
        raise ExportError(
            f"TensorRT-LLM keeps the scales of {algorithm.name} in {kept}, others would be evaluated differently "
            "(save_trtllm)",
            "leave quant.weight.scale_dtype out",
        )
