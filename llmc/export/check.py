"""Reads back what was written: each shard against the record it came from, the folder against the original."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ExportError
from ..quant import QWeight, UnitRecord
from .base import Exporter


def check_shard(path: Path, exporter: Exporter, record: UnitRecord, original_name: Callable[[str], str] = str) -> None:
    """Names, shapes, dtypes and values of a shard, through our reader and, where there is one, an independent one.

    ``original_name`` gives the record's name of a stored tensor, where blocks are numbered anew.

    Raises:
        ExportError: names the file and the tensor.
    """
    stored = {original_name(name): tensor for name, tensor in load_file(path).items()}
    expected = exporter.tensors(record)
    _same(path, expected, stored)
    del expected
    for name, weight in record.quantized.items() if exporter.stores_weights else ():
        own = {key: stored[key] for key in exporter.parts(name, stored)}
        for reader, value in _readings(exporter, own, name):
            if not _reads_as(value, weight):
                raise ExportError(f"{path}: {name} reads back differently through {reader}", "please report this")


def _readings(exporter: Exporter, stored: dict[str, Tensor], name: str) -> Iterator[tuple[str, Tensor | QWeight]]:
    """The weight by each reader, one at a time: a block's weights needn't be there twice."""
    back = exporter.read(stored)
    if name in back.quantized:
        yield "llmc", back.quantized[name]
    elif not exporter.transformed_only:
        yield "llmc", back.plain[f"{name}.weight"]
    del back
    other = exporter.independent(stored, name)
    if other is not None:
        yield "the backend's library", other


def _reads_as(value: Tensor | QWeight, weight: QWeight) -> bool:
    """Whether a reader found the values of a weight. Equal codes with equal scales needn't be multiplied."""
    if isinstance(value, QWeight):
        if value.spec == weight.spec and all(map(_equal, value.stored, weight.stored)):
            return True
        value = value.dequantize()
    return value.shape == weight.codes.shape and all(
        torch.equal(value[rows], part.float().to(value.dtype)) for rows, part in weight.dense_strips()
    )


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(_bits(left), _bits(right))


def _same(path: Path, expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    for name in sorted(expected.keys() | stored.keys()):
        if name not in stored or name not in expected:
            raise ExportError(f"{path}: tensor {name} is {'missing' if name in expected else 'one too many'}")
        left, right = expected[name], stored[name]
        if left.shape != right.shape or left.dtype != right.dtype:
            wanted, found = (f"{t.dtype} {tuple(t.shape)}" for t in (left, right))
            raise ExportError(f"{path}: tensor {name} is {found}, not {wanted}")
        if not torch.equal(_bits(left), _bits(right)):
            raise ExportError(f"{path}: tensor {name} holds other values than were written", "is the disk failing?")


def _bits(tensor: Tensor) -> Tensor:
    """What is stored, eight bytes at a time if it can be: torch compares single ones slowly, FP8 not at all."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return flat if len(flat) % 8 or flat.storage_offset() % 8 else flat.view(torch.int64)
