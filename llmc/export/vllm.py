"""compressed-tensors for vLLM: packed integers, int8 and FP8 codes as computed, pairs of FP4 codes.

Rules and names are those of vLLM 0.32's loader and of the compressed-tensors library, which also packs the codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from pathlib import Path
from typing import Any, ClassVar

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from torch import Tensor

from ..errors import ExportError
from ..quant import PerBlock, QuantSpec, Scheme, UnitRecord
from .base import Exporter, Layer, with_dtype
from .ct_layouts import Codes, Layout, Packed, Pairs, input_nbytes, input_tensors
from .shared import check_cache, check_fused, check_turned
from .vllm_rotations import check_rotations, transforms
from .vllm_schemes import MXFP4, NVFP4, PACKED, conditions, config_groups, format_of, scheme_of

_DENSE, _SEVERAL = "dense", "mixed-precision"
_INPUTS = ("input_scale", "input_zero_point", "input_global_scale")
_LAYOUTS: dict[str, Layout] = {PACKED: Packed(), NVFP4: Pairs(), MXFP4: Pairs()}
_CACHE_PARTS = ("k_scale", "v_scale")
_CACHE_SCHEME = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor", dynamic=False)
# Routers of mixtures of experts aren't Linears in Transformers, but vLLM would ask for their scales.
_ROUTERS = (r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$", r"re:.*shared_expert_gate$")


class VLLM(Exporter):
    """Every scheme that vLLM loads from a compressed-tensors checkpoint; and an FP8 KV cache with static scales."""

    name = "save_vllm"
    folder = "vllm_quant_model"
    backend: ClassVar[str] = "vLLM"
    mixes_schemes = True
    carries_images = True
    stores_group_index = False
    runs_rotations = True

    def check(self, layers: list[Layer]) -> list[str]:
        """The backend has kernels for few schemes, and runs Linears that it fuses with one."""
        turned = check_rotations(layers, self.kv)
        check_cache(self.kv, self.backend, self.name)
        if not self.schemes:
            return self._of_cache_alone()
        found = tuple(dict.fromkeys(layer.scheme for layer in layers if layer.spec)) or self.schemes
        self.check_schemes(found)
        check_fused(layers, self.backend)
        for layer in layers:
            self._check_layer(layer)
        check_turned(self.name, self._layout, [x for x in layers if not x.spec or isinstance(_layout(x.scheme), Codes)])
        return [*turned, *self.conditions(found), *self._of_encoder(layers), *self._slower(layers)]

    def check_schemes(self, schemes: Sequence[Scheme]) -> None:
        """Refuse schemes that the backend doesn't load.

        Raises:
            ExportError: the remedy names the nearest scheme that it does.
        """
        for scheme in schemes:
            format_of(_need_weight(scheme), scheme.act)

    def conditions(self, schemes: Sequence[Scheme]) -> list[str]:
        """Under which conditions the backend runs schemes that it loads as they were evaluated."""
        return [text for scheme in schemes for text in conditions(_need_weight(scheme), scheme.act)]

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
        own = _own(tensors, name, _layout(ours))
        if scheme.format == NVFP4:
            return _in_float32(own, scheme)
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        dense: Tensor = compressor.decompress(own, scheme)["weight"]
        return dense

    def config(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """The original's with a ``quantization_config``; ignored Linears by their exact names."""
        ignored = [name for layer in layers if layer.spec is None for name in layer.names]
        quantized = {name: layer.scheme for layer in layers if layer.spec is not None for name in layer.names}
        groups = config_groups(quantized or dict(zip(("Linear",), self.schemes, strict=False)))
        formats = dict.fromkeys(group.format for group in groups) or {_DENSE: None}
        quantization = QuantizationConfig(
            config_groups={f"group_{index}": group for index, group in enumerate(groups)},
            format=next(iter(formats)) if len(formats) == 1 else _SEVERAL,
            quantization_status="compressed",
            ignore=list(dict.fromkeys(["lm_head", *ignored, *_ROUTERS])) if groups else [],
            kv_cache_scheme=None if self.kv is None else _CACHE_SCHEME,
        ).model_dump(mode="json")
        quantization |= {"quant_method": "compressed-tensors"} | transforms(layers)
        return {**self._in_dtype_of_scales(original), "quantization_config": quantization}

    def serve(self, folder: Path) -> str:
        """vLLM's own server."""
        return f"vllm serve {folder}"

    def _in_dtype_of_scales(self, original: dict[str, Any]) -> dict[str, Any]:
        """The configuration with the dtype of packed weights' scales: the backend casts them to what it runs in."""
        specs = [scheme.weight for scheme in self.schemes if _layout(scheme) is _LAYOUTS[PACKED]]
        narrow = {spec.scale_dtype for spec in specs if spec is not None} & {torch.float16, torch.bfloat16}
        if len(narrow) != 1 or narrow == {self.stored}:
            return original
        return with_dtype(original, narrow.pop())

    def _of_cache_alone(self) -> list[str]:
        if self.kv is None:
            raise ExportError(
                f"{self.name} writes quantized weights, and this run quantizes none",
                f"write save_fake: {self.backend} loads that folder as it is, zeros included; or add quant.weight",
            )
        return []

    def _check_layer(self, layer: Layer) -> None:
        """Refuse shapes that the backend can't load."""
        if layer.spec is None:
            return
        whole = 32 // gcd(32, layer.spec.bits)
        if not layer.spec.symmetric and layer.rows % whole:
            raise ExportError(
                f"{layer.name}: {layer.rows} rows of zero points can't be packed by {whole} ({self.name})",
                "use symmetric: true, or write save_fake, which Transformers loads",
            )
        if len(layer.fused) > 1 and _splits_blocks(layer.rows, layer.spec):
            raise ExportError(
                f"{layer.name}: blocks don't divide its {layer.rows} rows, and {self.backend} fuses it ({self.name})",
                "use granularity: per_channel, or write save_fake, which Transformers loads",
            )

    def _of_encoder(self, layers: Sequence[Layer]) -> list[str]:
        """A warning of what only some of the backend's models do."""
        if not any(layer.outside and layer.spec for layer in layers):
            return []
        return [
            f"{self.name}: {self.backend} runs a quantized image encoder where its own code of the family hands the "
            "quantization on to it; Transformers loads this folder too"
        ]

    def _slower(self, layers: Sequence[Layer]) -> list[str]:
        """A warning of packed Linears whose shape the fastest kernel doesn't take."""
        packed = [x for x in layers if x.spec and x.act is None and format_of(x.spec, None) == PACKED]
        odd = sorted(
            {f"{x.name.rpartition('.')[2]} {x.rows}x{x.columns}" for x in packed if x.columns % 128 or x.rows % 64}
        )
        if not odd:
            return []
        return [
            f"{self.backend}'s fastest GPU kernel (Marlin) wants in % 128 = 0 and out % 64 = 0; it uses another for "
            f"{', '.join(odd)}"
        ]


def _layout(scheme: Scheme) -> Layout:
    return _LAYOUTS.get(format_of(_need_weight(scheme), scheme.act), Codes())


def _in_float32(own: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """The library's decompression of NVFP4 without its rounding of the products to bfloat16."""
    packed, scale = own["weight_packed"], own["weight_scale"].float()
    codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
    whole = own["weight_global_scale"]
    dense: Tensor = dequantize(x_q=codes, scale=scale, args=scheme.weights, global_scale=whole, dtype=torch.float32)
    return dense


def _own(tensors: Mapping[str, Tensor], name: str, layout: Layout) -> dict[str, Tensor]:
    """The parts of one weight."""
    return {part: tensors[f"{name}.{part}"] for part in layout.parts if f"{name}.{part}" in tensors}


def _need_weight(scheme: Scheme) -> QuantSpec:
    if scheme.weight is None:
        raise ValueError("a Linear that isn't quantized has no codes")
    return scheme.weight


def _splits_blocks(rows: int, spec: QuantSpec) -> bool:
    """Whether the rows of the next fused Linear would begin within a block."""
    return isinstance(spec.granularity, PerBlock) and rows % spec.granularity.size != 0
