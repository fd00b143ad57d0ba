"""Which schemes vLLM 0.32 loads from compressed-tensors checkpoints, in which format, and what it calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from ..errors import ExportError
from ..quant import ActSpec, PerBlock, PerChannel, PerCluster, PerGroup, PerTensor, PerToken, QuantSpec, Scheme

PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"

_GROUPS = (32, 64, 128)
_BLOCK = 128
_INT8 = "weight {bit: 8, symmetric: True, granularity: per_channel} with act {bit: 8, granularity: per_token}"
_FP8 = "weight {bit: e4m3, granularity: per_channel} with act {bit: e4m3, granularity: per_token}"


def format_of(spec: QuantSpec, act: ActSpec | None) -> str:
    """The format that stores a scheme.

    Raises:
        ExportError: vLLM has no kernel for it; the remedy names the nearest scheme that it has.
    """
    if isinstance(spec.granularity, PerCluster):
        raise ExportError(
            "vLLM has no scales per cluster of channels (save_vllm)", "write save_fake, which Transformers loads"
        )
    if act is None:
        return _weight_only(spec)
    if spec.grid == "int" and act.grid.grid == "int":
        return _integers(spec, act)
    return _floats(spec, act)


def _weight_only(spec: QuantSpec) -> str:
    if spec.grid == "int":
        _check_packed(spec)
        return PACKED
    if spec.grid != "e4m3" or spec.is_mx:
        raise _unknown(spec.describe(), "weight {bit: e4m3, granularity: per_channel}, or {bit: 4, per_group}")
    _check_fp8_weight(spec)
    return FLOAT


def _integers(spec: QuantSpec, act: ActSpec) -> str:
    scheme = f"{spec.describe()}, {act.describe()}"
    if spec.bits != 8 or act.grid.bits != 8:
        further = "; or leave out quant.act: weight {bit: 4, granularity: per_group}" if spec.bits == 4 else ""
        raise _unknown(scheme, f"{_INT8}{further}")
    if not spec.symmetric or not isinstance(spec.granularity, PerChannel | PerTensor):
        raise _unknown(scheme, f"symmetric weights with one scale per channel: {_INT8}")
    if not _per_token(act) and not _static(act):
        raise _unknown(scheme, f"one scale per token, or static ones per tensor: {_INT8}")
    _check_scales(spec)
    return INTEGER


def _floats(spec: QuantSpec, act: ActSpec) -> str:
    scheme = f"{spec.describe()}, {act.describe()}"
    if {spec.grid, act.grid.grid} != {"e4m3"} or spec.is_mx or act.grid.is_mx:
        raise _unknown(scheme, _FP8)
    blocks = isinstance(spec.granularity, PerBlock)
    if blocks != (act.grid.granularity == PerGroup(_BLOCK)):
        raise _unknown(scheme, f"{_FP8}, or per_block and per_group of {_BLOCK} together")
    if not blocks and not _per_token(act) and not _static(act):
        raise _unknown(scheme, f"one scale per token, or static ones per tensor: {_FP8}")
    _check_fp8_weight(spec)
    return FLOAT


def _per_token(act: ActSpec) -> bool:
    return isinstance(act.grid.granularity, PerToken)


def _static(act: ActSpec) -> bool:
    return isinstance(act.grid.granularity, PerTensor) and act.observer is not None


def _unknown(scheme: str, nearest: str) -> ExportError:
    return ExportError(
        f"vLLM has no kernel for {scheme} (save_vllm)",
        f"the nearest that it loads: {nearest}; or write save_fake, which Transformers loads (weights only)",
    )


def _check_scales(spec: QuantSpec) -> None:
    if spec.scale_dtype != torch.float32:
        raise ExportError(
            "vLLM multiplies 8-bit products by float32 scales, others would be evaluated differently (save_vllm)",
            "set quant.weight.scale_dtype: float32, or leave it out",
        )


def _check_fp8_weight(spec: QuantSpec) -> None:
    _check_scales(spec)
    if isinstance(spec.granularity, PerTensor):
        raise ExportError(
            "vLLM rounds FP8 weights with one scale per tensor again where it fuses Linears (save_vllm)",
            "use granularity: per_channel, or write save_fake, which Transformers loads",
        )
    if not isinstance(spec.granularity, PerChannel) and spec.granularity != PerBlock(_BLOCK):
        raise _unknown(spec.describe(), f"one scale per channel or per block of {_BLOCK}: {_FP8}")


def _check_packed(spec: QuantSpec) -> None:
    if spec.bits not in (4, 8):
        raise ExportError(
            f"vLLM has no kernel for {spec.bits}-bit weights (save_vllm)",
            "use quant.weight.bit: 4 or 8, or keep the bits and write save_fake, which Transformers loads",
        )
    if isinstance(spec.granularity, PerTensor | PerBlock):
        raise ExportError(
            "vLLM doesn't load weight-only checkpoints with one scale per tensor or block (save_vllm)",
            "use granularity: per_channel or per_group, or write save_fake, which Transformers loads",
        )
    if isinstance(spec.granularity, PerGroup) and spec.granularity.size not in _GROUPS:
        raise ExportError(
            f"vLLM has no kernel for groups of {spec.granularity.size} (save_vllm)",
            f"use group_size {', '.join(map(str, _GROUPS))}, or per_channel, or write save_fake for Transformers",
        )
    if not spec.symmetric and spec.bits != 4:
        raise ExportError(
            f"vLLM loads zero points with 4-bit weights only, not with {spec.bits} bits (save_vllm)",
            "use symmetric: true, or write save_fake, which Transformers loads",
        )


def config_groups(schemes: Mapping[str, Scheme]) -> list[QuantizationScheme]:
    """One group for each scheme of the named, quantized Linears.

    Where there are several, each names its Linears exactly, so that no group overlaps another: readers differ in which
    of two matching groups they take.
    """
    found = list(dict.fromkeys(schemes.values()))
    if len(found) == 1:
        return [scheme_of(scheme.weight, scheme.act) for scheme in found if scheme.weight is not None]
    names = {scheme: [name for name, own in schemes.items() if own == scheme] for scheme in found}
    return [scheme_of(s.weight, s.act, targets) for s, targets in names.items() if s.weight is not None]


def scheme_of(spec: QuantSpec, act: ActSpec | None, targets: Sequence[str] = ("Linear",)) -> QuantizationScheme:
    """The scheme of some modules, or of a class of them, as compressed-tensors describes it."""
    return QuantizationScheme(
        targets=list(targets),
        weights=_arguments(spec, dynamic=False),
        input_activations=None if act is None else _arguments(act.grid, dynamic=act.observer is None),
        format=format_of(spec, act),
    )


def _arguments(spec: QuantSpec, *, dynamic: bool) -> QuantizationArgs:
    names = {PerTensor: "tensor", PerChannel: "channel", PerToken: "token", PerGroup: "group", PerBlock: "block"}
    grain = spec.granularity
    return QuantizationArgs(
        num_bits=spec.bits,
        type="int" if spec.grid == "int" else "float",
        symmetric=spec.symmetric,
        strategy=names[type(grain)],
        group_size=grain.size if isinstance(grain, PerGroup) else None,
        block_structure=[grain.size, grain.size] if isinstance(grain, PerBlock) else None,
        dynamic=dynamic,
    )
