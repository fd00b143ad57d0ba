"""Version 1 of GPTQ's layout, which AutoGPTQ, GPTQModel, vLLM, SGLang and Transformers read.

The result of any weight method may be stored, not only GPTQ's. Rules are those of vLLM 0.32's ``auto_gptq.py``:
symmetric grids of 4 or 8 bits, groups of consecutive columns.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant import UnitRecord
from .base import Exporter, Layer, with_dtype
from .shared import check_turned
from .word_layouts import GptqV1, group_size, needed, read_by, stored_by
from .word_rules import WordRules, check_words

_LAYOUT = GptqV1()
_RULES = WordRules("save_autogptq", bits=(4, 8), zero_points=False)


class AutoGPTQ(Exporter):
    """Symmetric integers of 4 or 8 bits in groups of 32, 64 or 128, or with one scale a row."""

    name = "save_autogptq"
    folder = "autogptq_quant_model"
    stores_group_index = False
    scale_dtype = torch.float16

    def check(self, layers: list[Layer]) -> list[str]:
        """One scheme, weights only; Linears that backends fuse are quantized together."""
        check_turned(self.name, self._layout, [layer for layer in layers if layer.spec is None])
        return check_words(_RULES, self.schemes, self.kv, layers)

    def nbytes(self, layer: Layer) -> int:
        """Words, scales and the index of groups."""
        if layer.spec is None:
            return layer.rows * layer.columns * self.stored.itemsize
        return _LAYOUT.nbytes(layer.rows, layer.columns, layer.spec)

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of each weight; everything else as it is."""
        return stored_by(_LAYOUT, unit)

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        """Codes and scales."""
        return read_by(_LAYOUT, tensors, needed(self.spec), "qweight")

    def config(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """The original's, to be run in float16: backends cast scales to the dtype that they run in."""
        spec = needed(self.spec)
        quantization: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": spec.bits,
            "group_size": group_size(spec),
            "sym": True,
            "desc_act": False,
            "lm_head": False,
        }
        ignored = [layer.name for layer in layers if layer.spec is None]
        if ignored:  # "-:" leaves alone what the expression matches
            quantization["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in ignored}
        return {**with_dtype(original, torch.float16), "quantization_config": quantization}

    def serve(self, folder: Path) -> str:
        """vLLM's own server; the format is found in ``config.json``."""
        return f"vllm serve {folder} --dtype float16"
