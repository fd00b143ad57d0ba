"""ModelOpt's unified Hugging Face checkpoint for TensorRT-LLM.

Names and files are those that nvidia-modelopt 0.47 writes, rules those of the loaders of TensorRT-LLM's PyTorch
backend (``_torch/modules/linear.py``, ``_torch/model_config.py``), which ``trtllm_check`` restates for a whole folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError
from ..quant import UnitRecord
from .base import Exporter, Layer
from .modelopt_layouts import Algorithm, input_scale
from .shared import check_cache, check_fused
from .trtllm_config import HF_QUANT_CONFIG, hf_quant_config, quantization_config
from .trtllm_schemes import algorithm_of, conditions, need_weight

CACHE_NAMES = {"self_attn.k_scale": "self_attn.k_proj.k_scale", "self_attn.v_scale": "self_attn.v_proj.v_scale"}

_FURTHER = ("pre_quant_scale", "input_scale")


class TRTLLM(Exporter):
    """Weights alone in 4 and 8 bits, 4-bit weights with FP8 activations, FP8, NVFP4; a static FP8 KV cache."""

    name = "save_trtllm"
    folder = "trtllm_quant_model"
    mixes_schemes = True
    stores_group_index = False

    def check(self, layers: list[Layer]) -> list[str]:
        """TensorRT-LLM has a method for each of a few algorithms."""
        check_cache(self.kv, "TensorRT-LLM", self.name)
        if not self.schemes and self.kv is None:
            raise ExportError(
                "save_trtllm writes quantized weights, and this run quantizes none",
                "write save_fake, which TensorRT-LLM loads as it is; or add quant.weight",
            )
        found = tuple(dict.fromkeys(layer.scheme for layer in layers if layer.spec)) or self.schemes
        algorithms = {scheme: algorithm_of(scheme) for scheme in found}
        check_fused(layers, "TensorRT-LLM")
        for layer in layers:
            if layer.spec is not None and algorithms[layer.scheme].smooth and layer.rows % 2:
                raise ExportError(
                    f"{layer.name}: {layer.rows} rows of 4 bits don't fill their bytes (save_trtllm)",
                    "name it in ignored_layers",
                )
        return conditions(found)

    def nbytes(self, layer: Layer) -> int:
        """Codes, scales and what else the format stores."""
        if layer.spec is None:
            return layer.rows * layer.columns * self.stored.itemsize
        algorithm, static = algorithm_of(layer.scheme), layer.act is not None and layer.act.observer is not None
        smooth = layer.columns * self.stored.itemsize if algorithm.smooth and len(layer.fused) == 1 else 0
        return algorithm.nbytes(layer.rows, layer.columns, layer.spec) + 4 * static + smooth

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """The parts of each weight, the scale of its inputs where that is static, those of a static KV cache."""
        stored = unit.plain | {_renamed(name, CACHE_NAMES): scale.reshape(()) for name, scale in unit.cache.items()}
        for name, weight in unit.quantized.items():
            scheme, fused = self.scheme_of(name), self.fused_with(name)
            algorithm = algorithm_of(scheme)
            parts = algorithm.tensors(weight, [unit.quantized[other] for other in fused])
            parts |= input_scale(scheme.act, unit.inputs.get(name))
            if algorithm.smooth and len(fused) == 1:
                # Scales are folded into what feeds the Linear; the loader asks for the tensor all the same.
                parts["pre_quant_scale"] = torch.ones(weight.codes.shape[1], dtype=self.stored)
            stored |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        return stored

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        """Codes and scales. The range of an input can't be told from its scale."""
        scale, back = ".weight_scale", {stored: ours for ours, stored in CACHE_NAMES.items()}
        quantized, taken = {}, {name for name in tensors if name.endswith(tuple(back))}
        cache = {_renamed(name, back): tensors[name].reshape(1) for name in sorted(taken)}
        for name in [name.removesuffix(scale) for name in tensors if name.endswith(scale)]:
            scheme = self.scheme_of(name)
            algorithm = algorithm_of(scheme)
            own = {part: tensors[f"{name}.{part}"] for part in algorithm.parts}
            quantized[name] = algorithm.read(own, need_weight(scheme))
            taken |= {f"{name}.{part}" for part in (*algorithm.parts, *_FURTHER)}
        plain = {name: tensor for name, tensor in tensors.items() if name not in taken}
        return UnitRecord(plain=plain, quantized=quantized, cache=cache)

    def config(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """The original's with what ``hf_quant_config.json`` says, in the words that ModelOpt has for other readers."""
        found = quantization_config(_algorithms(layers), _ignored(layers), cache=self.kv is not None)
        return {**original, "quantization_config": found}

    def extra_files(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """``hf_quant_config.json``, which TensorRT-LLM reads."""
        return {HF_QUANT_CONFIG: hf_quant_config(_algorithms(layers), _ignored(layers), cache=self.kv is not None)}

    def serve(self, folder: Path) -> str:
        """TensorRT-LLM's server."""
        return f"trtllm-serve {folder}"


def _algorithms(layers: list[Layer]) -> dict[str, Algorithm]:
    return {layer.name: algorithm_of(layer.scheme) for layer in layers if layer.spec is not None}


def _ignored(layers: list[Layer]) -> list[str]:
    return [layer.name for layer in layers if layer.spec is None]


def _renamed(name: str, endings: Mapping[str, str]) -> str:
    """A name with another ending."""
    for ending, other in endings.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + other
    return name
