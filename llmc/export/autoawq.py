"""AutoAWQ's GEMM layout: four bits with zero points, scales in float16; vLLM, SGLang, LMDeploy and MLC-LLM read it.

The result of any weight method may be stored, not only AWQ's. Rules are those of vLLM 0.32's ``auto_awq.py``, of
AutoAWQ 0.2.9, and of MLC-LLM's quantization ``q4f16_autoawq``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from torch import Tensor

from ..errors import ExportError
from ..quant import QuantSpec, UnitRecord
from .base import Exporter, Layer, with_dtype
from .shared import check_turned
from .vllm_schemes import PACKED, scheme_of
from .word_layouts import AwqGemm, group_size, needed, read_by, stored_by
from .word_rules import WordRules, check_words

_LAYOUT = AwqGemm()


class AutoAWQ(Exporter):
    """Integers of 4 bits in groups of 32, 64 or 128, or with one scale a row."""

    name = "save_autoawq"
    folder = "autoawq_quant_model"
    stores_group_index = False
    scale_dtype = torch.float16
    rules: ClassVar[WordRules] = WordRules("save_autoawq", bits=(4,), zero_points=True)
    """What its loaders take."""

    def check(self, layers: list[Layer]) -> list[str]:
        """One scheme, weights only; Linears that backends fuse are quantized together."""
        warnings = check_words(self.rules, self.schemes, self.kv, layers)
        check_turned(self.name, self._layout, [layer for layer in layers if layer.spec is None])
        _check_names(self.name, layers)
        return warnings

    def nbytes(self, layer: Layer) -> int:
        """Words and scales."""
        if layer.spec is None:
            return layer.rows * layer.columns * self.stored.itemsize
        return _LAYOUT.nbytes(layer.rows, layer.columns, layer.spec)

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """``qweight``, ``qzeros`` and ``scales`` of each weight; everything else as it is."""
        return stored_by(_LAYOUT, unit)

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        """Codes, scales and zero points."""
        return read_by(_LAYOUT, tensors, needed(self.spec), "qweight")

    def independent(self, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
        """compressed-tensors' converter of such checkpoints, and its decompression."""
        return decompressed(tensors, name, needed(self.spec))

    def config(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """The original's, to be run in float16: backends cast scales to the dtype that they run in."""
        return awq_config(original, layers, needed(self.spec))

    def serve(self, folder: Path) -> str:
        """vLLM's own server; the format is found in ``config.json``."""
        return f"vllm serve {folder} --dtype float16"


class MLCLLM(AutoAWQ):
    """AutoAWQ's layout with the one group size that MLC-LLM converts."""

    name = "save_mlcllm"
    folder = "mlcllm_quant_model"
    model_types = frozenset({"llama"})
    rules = WordRules("save_mlcllm", bits=(4,), zero_points=True, groups=(128,), channels=False, ignores=False)

    def check(self, layers: list[Layer]) -> list[str]:
        """MLC-LLM takes every Linear but the head for quantized, and its Llama has no biases."""
        warnings = super().check(layers)
        biased = [layer.name for layer in layers if layer.biased]
        if biased:
            raise ExportError(
                f"{biased[0]} has a bias, for which MLC-LLM's Llama has no place (save_mlcllm)",
                "write save_autoawq for another backend, or save_fake and let MLC-LLM quantize it by itself",
            )
        return warnings

    def serve(self, folder: Path) -> str:
        """Conversion, configuration, compilation, and a chat. The template is the one thing to be chosen."""
        target, of = f"{folder}-mlc", "--quantization q4f16_autoawq"
        index = folder / "model.safetensors.index.json"
        return " && ".join(
            (
                f"mlc_llm convert_weight {folder} {of} --source-format awq --source {index} -o {target}",
                f"mlc_llm gen_config {folder} {of} --conv-template llama-3 -o {target}",
                f"mlc_llm compile {target}/mlc-chat-config.json -o {target}/lib.so",
                f"mlc_llm chat {target} --model-lib {target}/lib.so",
            )
        )


def awq_config(original: dict[str, Any], layers: list[Layer], spec: QuantSpec) -> dict[str, Any]:
    """``config.json`` of a folder in this layout, run in float16."""
    ignored = [layer.name for layer in layers if layer.spec is None]
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size(spec),
        "zero_point": True,  # also of symmetric grids: without, vLLM has no fast kernel
        "version": "gemm",
        "modules_to_not_convert": ignored or None,
    }
    return {**with_dtype(original, torch.float16), "quantization_config": quantization}


def decompressed(tensors: Mapping[str, Tensor], name: str, spec: QuantSpec) -> Tensor | None:
    """The dense weight ``name`` of a folder in this layout as compressed-tensors reads it, in float16."""
    if f"{name}.qweight" not in tensors:
        return None
    own = {f"{name}.{part}": tensors[f"{name}.{part}"] for part in _LAYOUT.parts}
    converted = AutoAWQConverter().process(own)
    scheme = scheme_of(replace(spec, symmetric=False, sym_mode="restricted"), None)  # zero points are always there
    local = {key.removeprefix(f"{name}."): tensor for key, tensor in converted.items()}
    dense: Tensor = BaseCompressor.get_value_from_registry(PACKED).decompress(local, scheme)["weight"]
    return dense


def _check_names(save: str, layers: list[Layer]) -> None:
    """Refuse an ignored Linear whose name is part of a quantized one's: loaders look for parts of names."""
    quantized = [layer.name for layer in layers if layer.spec is not None]
    for layer in layers:
        found = [name for name in quantized if layer.spec is None and layer.name in name]
        if found:
            raise ExportError(
                f"{layer.name} isn't quantized, and loaders would leave {found[0]} alone with it, whose name holds "
                f"that name ({save})",
                "quantize both or neither (ignored_layers), or write save_vllm",
            )
