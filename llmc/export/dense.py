"""Plain folders that Transformers and everything built on it load: the compressed and the transformed model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant import UnitRecord
from .base import Exporter, Layer, with_dtype


class FakeQuant(Exporter):
    """Dequantized or pruned weights: exactly those that were evaluated, in the narrowest dtype that holds them."""

    name = "save_fake"
    folder = "fake_quant_model"
    mixes_schemes = True
    carries_images = True
    stores_codes = False

    @property
    def dtype(self) -> torch.dtype:
        """That of the scales, the widest of them; with float32 scales, the computing dtype; the original's if nothing
        is quantized."""
        scales = [scheme.weight.product_dtype for scheme in self.schemes if scheme.weight is not None]
        if not scales:
            return self.stored
        widest = reduce(torch.promote_types, scales)
        return self.compute if torch.float32 in scales else widest

    def check(self, layers: list[Layer]) -> list[str]:
        """Any loader will do, but it rounds neither activations nor the KV cache."""
        if self.transformed_only:
            return []
        acts = dict.fromkeys(scheme.act.describe() for scheme in self.schemes if scheme.act is not None)
        loose = [f"activations to {' and '.join(acts)}"] if acts else []
        loose += [f"the KV cache to {self.kv.describe()}"] if self.kv is not None else []
        if not loose:
            return []
        return [
            f"{self.name} holds weights only: whoever loads it doesn't round {' and '.join(loose)}, "
            "as the evaluated model does"
        ]

    def nbytes(self, layer: Layer) -> int:
        """Quantized weights in ``dtype``; ignored ones as they were."""
        return layer.rows * layer.columns * (self.stored if layer.spec is None else self.dtype).itemsize

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """Dense weights; everything else as in the original. All is laid out as the model's own checkpoints have it."""
        return self._joined(
            unit.plain | {f"{name}.weight": w.dequantize(self.dtype) for name, w in unit.quantized.items()}
        )

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        """The values; the codes can't be told from them."""
        if self._layout is None:
            return UnitRecord(plain=tensors)
        plain: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            plain |= self._layout.split(name, tensor) or {name: tensor}
        return UnitRecord(plain=plain)

    def parts(self, name: str, stored: Collection[str]) -> list[str]:
        """The one tensor in which the weight lies, if a unit's tensors are joined."""
        holder = f"{name}.weight" if self._layout is None else self._layout.holder(f"{name}.weight")
        return [holder] if holder in stored else []

    def _joined(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors) if self._layout is None else self._layout.join(tensors)

    def config(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """The original's, with the wider of its dtype and the weights', and no stale quantization."""
        return with_dtype(original, torch.promote_types(self.stored, self.dtype))

    def serve(self, folder: Path) -> str:
        """Any loader of the original model; the evaluated dtype gives the evaluated logits."""
        auto = "AutoModelForImageTextToText" if self.images else "AutoModelForCausalLM"
        return f"{auto}.from_pretrained('{folder}', dtype={self.compute})"


class Transformed(FakeQuant):
    """The model after its transforms and its pruning, not quantized, in the original's dtypes."""

    name = "save_trans"
    folder = "transformed_model"
    transformed_only = True

    def nbytes(self, layer: Layer) -> int:
        """As the original."""
        return layer.rows * layer.columns * self.stored.itemsize

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """As they are, laid out as the model's own checkpoints have them."""
        return self._joined(unit.plain)

    def config(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """The original's."""
        return {key: value for key, value in original.items() if key != "quantization_config"}
