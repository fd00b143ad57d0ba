"""compressed-tensors for vLLM: codes packed as computed, ``pack-quantized``.

Rules and names are those of vLLM 0.32's loader and of the compressed-tensors library, which also packs the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor

from ..errors import ExportError
from ..quant import Fp8Grid, KvSpec, PerGroup, PerTensor, QuantSpec, QWeight, UnitRecord
from .base import Exporter, Layer

_FORMAT, _DENSE = "pack-quantized", "dense"
_GROUPS = (32, 64, 128)
_CACHE_PARTS = ("k_scale", "v_scale")
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_CACHE_SCHEME = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor", dynamic=False)
# Routers of mixtures of experts aren't Linears in Transformers, but vLLM would ask for their scales.
_ROUTERS = (r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$")


class VLLM(Exporter):
    """Weight-only W4A16 and W8A16, or weights as they are; and an FP8 KV cache with static scales."""

    name = "save_vllm"
    folder = "vllm_quant_model"
    stores_group_index = False

    def check(self, layers: list[Layer]) -> list[str]:
        """vLLM's kernels: 4 and 8 bits; groups of 32, 64, 128 or whole rows; zero points with 4 bits only."""
        if self.spec is not None:
            _check_spec(self.spec)
        elif self.kv is None:
            raise ExportError("save_vllm was asked for without anything quantized", "set quant.weight or quant.kvcache")
        if self.kv is not None:
            _check_cache(self.kv)
        by_name = {layer.name: layer for layer in layers}
        for layer in layers:
            differing = [name for name in layer.fused if by_name[name].spec != layer.spec]
            if differing:
                raise ExportError(
                    f"vLLM fuses {', '.join(layer.fused)}, but {layer.name} and {differing[0]} have different schemes",
                    "quantize or ignore them together (ignored_layers)",
                )
            if layer.spec is not None and not layer.spec.symmetric and layer.rows % 8:
                raise ExportError(
                    f"{layer.name}: {layer.rows} rows of zero points can't be packed by 8 (save_vllm)",
                    "use symmetric: true, or write save_fake, which Transformers loads",
                )
        odd = sorted(
            {
                f"{x.name.rpartition('.')[2]} {x.rows}x{x.columns}"
                for x in layers
                if x.spec and (x.columns % 128 or x.rows % 64)
            }
        )
        if odd:
            return [
                "vLLM's fastest GPU kernel (Marlin) wants in % 128 = 0 and out % 64 = 0; "
                f"it uses another for {', '.join(odd)}"
            ]
        return []

    def nbytes(self, layer: Layer) -> int:
        """Codes, scales, zero points and the shape."""
        if layer.spec is None:
            return layer.rows * layer.columns * self.stored.itemsize
        groups = layer.columns // layer.spec.group_size(layer.columns)
        zero = 0 if layer.spec.symmetric else layer.rows * groups * layer.spec.bits // 8
        codes = layer.rows * -(-layer.columns * layer.spec.bits // 32) * 4
        return codes + layer.rows * groups * layer.spec.scale_dtype.itemsize + zero + 16

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """``weight_packed``, ``weight_scale``, ``weight_shape`` and, if asymmetric, ``weight_zero_point`` of each."""
        stored = unit.plain | unit.cache
        for name, weight in unit.quantized.items():
            stored[f"{name}.weight_packed"] = pack_to_int32(weight.codes, weight.spec.bits)
            stored[f"{name}.weight_scale"] = weight.scale
            stored[f"{name}.weight_shape"] = torch.tensor(weight.codes.shape, dtype=torch.int64)
            if weight.zero is not None:
                stored[f"{name}.weight_zero_point"] = pack_to_int32(weight.zero, weight.spec.bits, packed_dim=0)
        return stored

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        """Unpack the codes."""
        names = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
        cache = {name: tensor for name, tensor in tensors.items() if name.endswith(_CACHE_PARTS)}
        others = {name: tensor for name, tensor in tensors.items() if name not in cache}
        plain = {name: tensor for name, tensor in others.items() if name.rpartition(".")[2] not in _PARTS}
        return UnitRecord(plain, {name: self._read_weight(tensors, name) for name in names}, cache)

    def _read_weight(self, tensors: Mapping[str, Tensor], name: str) -> QWeight:
        spec = self._need_spec()
        shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
        scale = tensors[f"{name}.weight_scale"]
        zero = tensors.get(f"{name}.weight_zero_point")
        if zero is not None:
            zero = unpack_from_int32(zero, spec.bits, scale.shape, packed_dim=0)
        return QWeight(unpack_from_int32(tensors[f"{name}.weight_packed"], spec.bits, shape), scale, zero, spec)

    def independent(self, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
        """compressed-tensors' own decompression."""
        if f"{name}.weight_packed" not in tensors:
            return None
        parts = {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}
        dense: Tensor = BaseCompressor.get_value_from_registry(_FORMAT).decompress(parts, self._scheme())["weight"]
        return dense

    def config(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """The original's with a ``quantization_config``; ignored Linears by their exact names."""
        ignored = [layer.name for layer in layers if layer.spec is None]
        quantization = QuantizationConfig(
            config_groups={} if self.spec is None else {"group_0": self._scheme()},
            format=_DENSE if self.spec is None else _FORMAT,
            quantization_status="compressed",
            ignore=[] if self.spec is None else ["lm_head", *ignored, *_ROUTERS],
            kv_cache_scheme=None if self.kv is None else _CACHE_SCHEME,
        ).model_dump(mode="json")
        return {**original, "quantization_config": {**quantization, "quant_method": "compressed-tensors"}}

    def serve(self, folder: Path) -> str:
        """vLLM's own server."""
        return f"vllm serve {folder}"

    def _need_spec(self) -> QuantSpec:
        if self.spec is None:
            raise ExportError("save_vllm was asked for without a quantized weight", "set quant.weight")
        return self.spec

    def _scheme(self) -> QuantizationScheme:
        spec = self._need_spec()
        group = spec.granularity.size if isinstance(spec.granularity, PerGroup) else None
        weights = QuantizationArgs(
            num_bits=spec.bits,
            type="int",
            symmetric=spec.symmetric,
            strategy="channel" if group is None else "group",
            group_size=group,
            dynamic=False,
        )
        return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=None, format=_FORMAT)


def _check_cache(kv: KvSpec) -> None:
    fp8 = isinstance(kv.grid, Fp8Grid) and kv.grid.dtype == torch.float8_e4m3fn
    if not (fp8 and kv.static and kv.grid.scale_dtype == torch.float32):
        raise ExportError(
            f"vLLM has no KV cache such as quant.kvcache asks for ({kv.describe()}; save_vllm)",
            "use method: Naive, bit: e4m3, symmetric: True, granularity: per_tensor, static: True; "
            "or keep it for the evaluation and write save_fake",
        )


def _check_spec(spec: QuantSpec) -> None:
    if spec.bits not in (4, 8):
        raise ExportError(
            f"vLLM has no kernel for {spec.bits}-bit weights (save_vllm)",
            "use quant.weight.bit: 4 or 8, or keep the bits and write save_fake, which Transformers loads",
        )
    if isinstance(spec.granularity, PerTensor):
        raise ExportError(
            "vLLM doesn't load weight-only checkpoints with one scale per tensor (save_vllm)",
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
