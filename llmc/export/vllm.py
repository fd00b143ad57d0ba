"""compressed-tensors for vLLM: packed integers, or int8 and FP8 codes as computed.

Rules and names are those of vLLM 0.32's loader and of the compressed-tensors library, which also packs the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from torch import Tensor

from ..errors import ExportError
from ..quant import Fp8Grid, KvSpec, PerBlock, QuantSpec, Scheme, UnitRecord
from .base import Exporter, Layer
from .ct_layouts import Codes, Layout, Packed, input_nbytes, input_tensors
from .vllm_rotations import check_rotations, transforms
from .vllm_schemes import PACKED, config_groups, format_of, scheme_of

_DENSE, _SEVERAL = "dense", "mixed-precision"
_INPUTS = ("input_scale", "input_zero_point")
_CACHE_PARTS = ("k_scale", "v_scale")
_CACHE_SCHEME = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor", dynamic=False)
# Routers of mixtures of experts aren't Linears in Transformers, but vLLM would ask for their scales.
_ROUTERS = (r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$")


class VLLM(Exporter):
    """Packed W4A16 and W8A16; W8A8 in integers and in FP8; and an FP8 KV cache with static scales."""

    name = "save_vllm"
    folder = "vllm_quant_model"
    mixes_schemes = True
    stores_group_index = False
    runs_rotations = True

    def check(self, layers: list[Layer]) -> list[str]:
        """vLLM has kernels for few schemes, and runs Linears that it fuses with one."""
        turned = check_rotations(layers, self.kv)
        if self.kv is not None:
            _check_cache(self.kv)
        if not self.schemes:
            return self._of_cache_alone()
        for scheme in dict.fromkeys(layer.scheme for layer in layers if layer.spec) or self.schemes:
            format_of(_need_weight(scheme), scheme.act)
        by_name = {layer.name: layer for layer in layers}
        for layer in layers:
            differing = [name for name in layer.fused if by_name[name].scheme != layer.scheme]
            if differing:
                raise ExportError(
                    f"vLLM fuses {', '.join(layer.fused)}, but {layer.name} and {differing[0]} have different schemes",
                    "quantize them alike, or ignore them together (quant.mix_bits, ignored_layers)",
                )
            _check_layer(layer)
        packed = [layer for layer in layers if layer.spec and format_of(layer.spec, layer.act) == PACKED]
        return turned + _slower(packed)

    def nbytes(self, layer: Layer) -> int:
        """Codes, scales and what else the format stores."""
        if layer.spec is None:
            return layer.rows * layer.columns * self.stored.itemsize
        codes = _layout(layer.scheme).nbytes(layer.rows, layer.columns, layer.spec)
        return codes + input_nbytes(layer.act)

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """The parts of each weight, the scale of its inputs where that is static, and those of a static KV cache."""
        stored = unit.plain | unit.cache
        for name, weight in unit.quantized.items():
            scheme = self.scheme_of(name)
            parts = _layout(scheme).tensors(weight) | input_tensors(scheme.act, unit.inputs.get(name))
            stored |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        return stored

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        """Codes and scales. The range of an input can't be told from its scale."""
        scale = ".weight_scale"
        names = [name.removesuffix(scale) for name in tensors if name.endswith(scale)]
        cache = {name: tensor for name, tensor in tensors.items() if name.endswith(_CACHE_PARTS)}
        quantized, taken = {}, set(cache)
        for name in names:
            scheme = self.scheme_of(name)
            own = _own(tensors, name, _layout(scheme))
            quantized[name] = _layout(scheme).read(own, _need_weight(scheme))
            taken |= {f"{name}.{part}" for part in (*own, *_INPUTS)}
        plain = {name: tensor for name, tensor in tensors.items() if name not in taken}
        return UnitRecord(plain=plain, quantized=quantized, cache=cache)

    def independent(self, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
        """compressed-tensors' own decompression."""
        if f"{name}.weight_scale" not in tensors:
            return None
        ours = self.scheme_of(name)
        scheme = scheme_of(_need_weight(ours), ours.act)
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        dense: Tensor = compressor.decompress(_own(tensors, name, _layout(ours)), scheme)["weight"]
        return dense

    def config(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """The original's with a ``quantization_config``; ignored Linears by their exact names."""
        ignored = [layer.name for layer in layers if layer.spec is None]
        quantized = {layer.name: layer.scheme for layer in layers if layer.spec is not None}
        groups = config_groups(quantized or dict(zip(("Linear",), self.schemes, strict=False)))
        formats = dict.fromkeys(group.format for group in groups) or {_DENSE: None}
        quantization = QuantizationConfig(
            config_groups={f"group_{index}": group for index, group in enumerate(groups)},
            format=next(iter(formats)) if len(formats) == 1 else _SEVERAL,
            quantization_status="compressed",
            ignore=["lm_head", *ignored, *_ROUTERS] if groups else [],
            kv_cache_scheme=None if self.kv is None else _CACHE_SCHEME,
        ).model_dump(mode="json")
        quantization |= {"quant_method": "compressed-tensors"} | transforms(layers)
        return {**original, "quantization_config": quantization}

    def serve(self, folder: Path) -> str:
        """vLLM's own server."""
        return f"vllm serve {folder}"

    def _of_cache_alone(self) -> list[str]:
        if self.kv is None:
            raise ExportError(
                "save_vllm writes quantized weights, and this run quantizes none",
                "write save_fake: vLLM loads that folder as it is, zeros included; or add quant.weight",
            )
        return []


def _layout(scheme: Scheme) -> Layout:
    return Packed() if format_of(_need_weight(scheme), scheme.act) == PACKED else Codes()


def _own(tensors: Mapping[str, Tensor], name: str, layout: Layout) -> dict[str, Tensor]:
    """The parts of one weight."""
    return {part: tensors[f"{name}.{part}"] for part in layout.parts if f"{name}.{part}" in tensors}


def _need_weight(scheme: Scheme) -> QuantSpec:
    if scheme.weight is None:
        raise ValueError("a Linear that isn't quantized has no codes")
    return scheme.weight


def _check_layer(layer: Layer) -> None:
    """Refuse what vLLM can't load of one Linear."""
    if layer.spec is None:
        return
    if not layer.spec.symmetric and layer.rows % 8:
        raise ExportError(
            f"{layer.name}: {layer.rows} rows of zero points can't be packed by 8 (save_vllm)",
            "use symmetric: true, or write save_fake, which Transformers loads",
        )
    if len(layer.fused) > 1 and _splits_blocks(layer.rows, layer.spec):
        raise ExportError(
            f"{layer.name}: blocks don't divide its {layer.rows} rows, and vLLM fuses it (save_vllm)",
            "use granularity: per_channel, or write save_fake, which Transformers loads",
        )


def _check_cache(kv: KvSpec) -> None:
    fp8 = isinstance(kv.grid, Fp8Grid) and kv.grid.dtype == torch.float8_e4m3fn
    if not (fp8 and kv.static and kv.grid.scale_dtype == torch.float32):
        raise ExportError(
            f"vLLM has no KV cache such as quant.kvcache asks for ({kv.describe()}; save_vllm)",
            "use method: Naive, bit: e4m3, symmetric: True, granularity: per_tensor, static: True; "
            "or keep it for the evaluation and write save_fake",
        )


def _splits_blocks(rows: int, spec: QuantSpec) -> bool:
    """Whether the rows of the next fused Linear would begin within a block."""
    return isinstance(spec.granularity, PerBlock) and rows % spec.granularity.size != 0


def _slower(layers: list[Layer]) -> list[str]:
    """A warning of packed Linears whose shape the fastest kernel doesn't take."""
    odd = sorted(
        {f"{x.name.rpartition('.')[2]} {x.rows}x{x.columns}" for x in layers if x.columns % 128 or x.rows % 64}
    )
    if not odd:
        return []
    return [
        f"vLLM's fastest GPU kernel (Marlin) wants in % 128 = 0 and out % 64 = 0; it uses another for {', '.join(odd)}"
    ]
