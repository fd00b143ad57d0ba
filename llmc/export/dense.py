"""Plain folders that Transformers and everything built on it load: the fake-quantized and the transformed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..quant import UnitRecord
from .base import Exporter, Layer, with_dtype


class FakeQuant(Exporter):
    """Dequantized weights in the computing dtype: exactly the weights that were evaluated."""

    name = "save_fake"
    folder = "fake_quant_model"

    def nbytes(self, layer: Layer) -> int:
        """Every weight in the computing dtype; ignored ones as they were."""
        return layer.rows * layer.columns * (self.stored if layer.spec is None else self.compute).itemsize

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """Dense weights; everything else as in the original."""
        return unit.plain | {f"{name}.weight": w.dequantize(self.compute) for name, w in unit.quantized.items()}

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        """The values; the codes can't be told from them."""
        return UnitRecord(plain=tensors)

    def config(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """The original's, with the dtype that keeps the weights exact, and no stale quantization."""
        return with_dtype(original, self.compute)

    def serve(self, folder: Path) -> str:
        """Load by dtype ``auto``: another one would round the weights."""
        return f"AutoModelForCausalLM.from_pretrained('{folder}', dtype='auto')"


class Transformed(FakeQuant):
    """The model after its function-preserving transforms, not quantized, in the original's dtypes."""

    name = "save_trans"
    folder = "transformed_model"
    transformed_only = True

    def nbytes(self, layer: Layer) -> int:
        """As the original."""
        return layer.rows * layer.columns * self.stored.itemsize

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """As they are."""
        return dict(unit.plain)

    def config(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """The original's."""
        return {key: value for key, value in original.items() if key != "quantization_config"}
