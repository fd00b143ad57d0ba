"""A unit's record as it is, codes and all, in a file of a run's state: for a later pass of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..quant import QuantSpec, QWeight, UnitRecord

_PARTS = ("codes", "scale", "zero", "group_index", "global_scale")


class RecordFormat:
    """Codes and scales in the dtypes in which they were computed (a ``UnitFormat``).

    Args:
        specs: the grids of the quantized weights, by the checkpoint's names of their modules.
    """

    name = "records"

    def __init__(self, specs: Mapping[str, QuantSpec]) -> None:
        self._specs = dict(specs)

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """Plain tensors by their names, the parts of quantized ones by theirs behind the module's."""
        stored = dict(unit.plain)
        for name, weight in unit.quantized.items():
            whole = weight.spec.global_scale
            exact = None if whole is None else torch.tensor(whole, dtype=torch.float64)
            parts = (weight.codes, weight.scale, weight.zero, weight.group_index, exact)
            stored |= {f"{name}.{part}": t for part, t in zip(_PARTS, parts, strict=True) if t is not None}
        return stored

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        """The inverse."""
        plain, quantized = dict(tensors), {}
        for name, spec in self._specs.items():
            own = {part: plain.pop(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in plain}
            if not own:
                continue
            if "global_scale" in own:
                spec = replace(spec, global_scale=float(own["global_scale"]))
            quantized[name] = QWeight(own["codes"], own["scale"], own.get("zero"), spec, own.get("group_index"))
        return UnitRecord(plain=plain, quantized=quantized)
