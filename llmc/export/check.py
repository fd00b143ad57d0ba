"""Reads back what was written: each shard against the record it came from, the folder against the original."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ExportError
from ..quant import UnitRecord
from .base import Exporter


def check_shard(path: Path, exporter: Exporter, record: UnitRecord) -> None:
    """Names, shapes, dtypes and values of a shard, through our reader and, where there is one, an independent one.

    Raises:
        ExportError: names the file and the tensor.
    """
    stored = load_file(path)
    expected = exporter.tensors(record)
    _same(path, expected, stored)
    for name, weight in record.quantized.items():
        dense = weight.dequantize()
        for reader, value in _readings(exporter, stored, name).items():
            if not torch.equal(value.float(), dense.to(value.dtype).float()):
                raise ExportError(f"{path}: {name} reads back differently through {reader}", "please report this")


def _readings(exporter: Exporter, stored: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    readings: dict[str, Tensor] = {}
    back = exporter.read(stored)
    if name in back.quantized:
        readings["llmc"] = back.quantized[name].dequantize()
    elif not exporter.transformed_only:
        readings["llmc"] = back.plain[f"{name}.weight"]
    other = exporter.independent(stored, name)
    if other is not None:
        readings["the backend's library"] = other
    return readings


def _same(path: Path, expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    for name in sorted(expected.keys() | stored.keys()):
        if name not in stored or name not in expected:
            raise ExportError(f"{path}: tensor {name} is {'missing' if name in expected else 'one too many'}")
        left, right = expected[name], stored[name]
        if left.shape != right.shape or left.dtype != right.dtype:
            wanted, found = (f"{t.dtype} {tuple(t.shape)}" for t in (left, right))
            raise ExportError(f"{path}: tensor {name} is {found}, not {wanted}")
        if not torch.equal(left, right):
            raise ExportError(f"{path}: tensor {name} holds other values than were written", "is the disk failing?")
