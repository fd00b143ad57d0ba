"""Which schemes vLLM 0.32 loads from compressed-tensors checkpoints, in which format, and what it calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from ..errors import ExportError
from ..quant import ActSpec, PerBlock, PerChannel, PerCluster, PerGroup, PerTensor, PerToken, QuantSpec, Scheme

PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"

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
    if spec.is_nvfp4 or spec.is_mx:
        return _micro(spec, act)
    if spec.grid == "int":
        return _weight_only(spec) if act is None else _integers(spec, act)
    return _floats(spec, act)


def conditions(spec: QuantSpec, act: ActSpec | None) -> list[str]:
    """What else must be so for vLLM to run a scheme that it loads as it was evaluated."""
    found, name = [], Scheme(spec, act).describe()
    if spec.grid == "int" and act is None and spec.bits not in (4, 8):
        found.append("only on NVIDIA GPUs, and with the package humming installed")
    if _is_w4a8(spec, act):
        found.append("only on CPUs and Intel GPUs")
    if _is_w4a8_fp8(spec, act):
        found.append("only on Hopper GPUs (SM90), where it rounds the groups' scales once more, to e4m3")
    if act is not None and (spec.is_nvfp4 or spec.is_mx):
        found.append("only on GPUs with such products (Blackwell); others leave the activations as they are")
    if spec.is_mx and act is None:
        found.append("on Blackwell GPUs with activations that it rounds to MXFP4, which the evaluation doesn't")
    return [f"save_vllm: vLLM runs {name} {condition}" for condition in found]


def _micro(spec: QuantSpec, act: ActSpec | None) -> str:
    """NVFP4, MXFP4 and MXFP8 have groups of their own."""
    grid = None if act is None else act.grid
    alike = grid is not None and (grid.grid, grid.scale_dtype) == (spec.grid, spec.scale_dtype)
    if spec.is_nvfp4:
        if grid is not None and not alike:
            raise _unknown(spec, act, "weight {bit: nvfp4} with act {bit: nvfp4}, or without act")
        return NVFP4
    if spec.grid == "e4m3":
        if not alike:
            raise _unknown(spec, act, "weight {bit: mxfp8} with act {bit: mxfp8}: it always rounds both")
        return MXFP8
    wide = grid is not None and not grid.is_mx and grid.grid == "e4m3"
    if grid is not None and not alike and not (wide and grid.granularity in (PerToken(), PerGroup(_BLOCK))):
        raise _unknown(spec, act, "weight {bit: mxfp4} alone, with act {bit: mxfp4}, or {bit: e4m3, per_token}")
    return MXFP4


def _weight_only(spec: QuantSpec) -> str:
    _check_packed(spec)
    return PACKED


def _integers(spec: QuantSpec, act: ActSpec) -> str:
    if _is_w4a8(spec, act):
        _check_narrow(spec)
        return INTEGER
    if _is_w4a8_fp8(spec, act):
        _check_narrow(spec)
        if spec.granularity != PerGroup(_BLOCK):
            raise _unknown(spec, act, f"weight {{bit: 4, per_group, group_size: {_BLOCK}}} with these activations")
        return PACKED
    if act.grid.grid != "int":
        raise _unknown(spec, act, _FP8)
    if spec.bits != 8 or act.grid.bits != 8:
        further = "; or leave out quant.act: weight {bit: 4, granularity: per_group}" if spec.bits == 4 else ""
        raise _unknown(spec, act, f"{_INT8}{further}")
    if not spec.symmetric or not isinstance(spec.granularity, PerChannel | PerTensor):
        raise _unknown(spec, act, f"symmetric weights with one scale per channel: {_INT8}")
    if not _per_token(act) and not _static(act):
        raise _unknown(spec, act, f"one scale per token, or static ones per tensor: {_INT8}")
    _check_scales(spec)
    return INTEGER


def _floats(spec: QuantSpec, act: ActSpec | None) -> str:
    grids = {spec.grid} | ({act.grid.grid} if act is not None else set())
    if grids != {"e4m3"} or (act is not None and act.grid.is_mx):
        raise _unknown(spec, act, _FP8 if act is not None else "weight {bit: e4m3, per_channel}, or {bit: nvfp4}")
    blocks = isinstance(spec.granularity, PerBlock)
    if act is not None:
        if blocks != (act.grid.granularity == PerGroup(_BLOCK)):
            raise _unknown(spec, act, f"{_FP8}, or per_block and per_group of {_BLOCK} together")
        if not blocks and not _per_token(act) and not _static(act):
            raise _unknown(spec, act, f"one scale per token, or static ones per tensor: {_FP8}")
    _check_scales(spec)
    if not isinstance(spec.granularity, PerTensor | PerChannel) and spec.granularity != PerBlock(_BLOCK):
        raise _unknown(spec, act, f"one scale per channel, tensor or block of {_BLOCK}: {_FP8}")
    return FLOAT


def _is_w4a8(spec: QuantSpec, act: ActSpec | None) -> bool:
    ours = spec.grid == "int" and spec.bits == 4 and spec.symmetric
    return ours and act is not None and act.grid.grid == "int" and act.grid.bits == 8 and _per_token(act)


def _is_w4a8_fp8(spec: QuantSpec, act: ActSpec | None) -> bool:
    ours = spec.grid == "int" and spec.bits == 4 and spec.symmetric
    return ours and act is not None and act.grid.grid == "e4m3" and _per_token(act)


def _per_token(act: ActSpec) -> bool:
    return isinstance(act.grid.granularity, PerToken)


def _static(act: ActSpec) -> bool:
    return isinstance(act.grid.granularity, PerTensor) and act.observer is not None


def _unknown(spec: QuantSpec, act: ActSpec | None, nearest: str) -> ExportError:
    return ExportError(
        f"vLLM has no kernel for {Scheme(spec, act).describe()} (save_vllm)",
        f"the nearest that it loads: {nearest}; or write save_fake, which Transformers loads (weights only)",
    )


def _check_scales(spec: QuantSpec) -> None:
    if spec.scale_dtype != torch.float32:
        raise ExportError(
            "vLLM multiplies 8-bit products by float32 scales, others would be evaluated differently (save_vllm)",
            "set quant.weight.scale_dtype: float32, or leave it out",
        )


def _check_narrow(spec: QuantSpec) -> None:
    """4-bit weights with 8-bit activations."""
    if spec.scale_dtype == torch.float32:
        raise ExportError(
            "vLLM keeps the scales of 4-bit weights in the model's 16 bits, float32 would be evaluated differently "
            "(save_vllm)",
            "leave quant.weight.scale_dtype out",
        )
    _check_packed(spec)


def _check_packed(spec: QuantSpec) -> None:
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
    if not spec.symmetric and spec.bits == 8:
        raise ExportError(
            "vLLM has no kernel for 8-bit weights with zero points (save_vllm)",
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
        input_activations=None if act is None else _arguments(act.grid, dynamic=_dynamic(act)),
        format=format_of(spec, act),
    )


def _dynamic(act: ActSpec) -> bool | str:
    """NVFP4 has dynamic scales over a static one."""
    return "local" if act.grid.is_nvfp4 else act.observer is None


def _arguments(spec: QuantSpec, *, dynamic: bool | str) -> QuantizationArgs:
    names = {PerTensor: "tensor", PerChannel: "channel", PerToken: "token", PerGroup: "group", PerBlock: "block"}
    grain, scales = spec.granularity, {torch.float8_e8m0fnu: torch.uint8, torch.float8_e4m3fn: torch.float8_e4m3fn}
    return QuantizationArgs(
        num_bits=spec.bits,
        type="int" if spec.grid == "int" else "float",
        symmetric=spec.symmetric,
        strategy="tensor_group" if spec.is_nvfp4 else names[type(grain)],
        group_size=grain.size if isinstance(grain, PerGroup) else None,
        block_structure=[grain.size, grain.size] if isinstance(grain, PerBlock) else None,
        dynamic=dynamic,
        scale_dtype=scales.get(spec.scale_dtype),
    )
