"""Codes in 32-bit words with scales ``[groups, out]`` beside them: AutoAWQ's GEMM layout, and version 1 of GPTQ's.

Both store a Linear transposed, ``[in, out]``. Their words hold unsigned codes and zero points; llmc's are signed, both
less by half the range, which cancels.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import ClassVar

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from ..quant import PerGroup, QuantSpec, QWeight, UnitRecord
from .ct_layouts import Layout

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


class AwqGemm:
    """Four bits; the eight columns of a word in the order 0, 2, 4, 6, 1, 3, 5, 7, that of a fast conversion to halves.

    ``qweight`` int32 ``[in, out / 8]``; ``qzeros`` int32 ``[groups, out / 8]``, 8 everywhere on symmetric grids;
    ``scales`` ``[groups, out]``.
    """

    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def tensors(self, weight: QWeight) -> dict[str, Tensor]:
        """Words and scales."""
        zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero is None else weight.zero
        scales = weight.scale.T.contiguous()
        return {"qweight": _interleaved(weight.codes), "qzeros": _interleaved(zero), "scales": scales}

    def read(self, stored: Mapping[str, Tensor], spec: QuantSpec) -> QWeight:
        """The inverse. The zero points of a symmetric grid say nothing, and are left out."""
        zero = None if spec.symmetric else _straightened(stored["qzeros"])
        return QWeight(_straightened(stored["qweight"]), stored["scales"].T.contiguous(), zero, spec)

    def nbytes(self, rows: int, columns: int, spec: QuantSpec) -> int:
        """Bytes of all that ``tensors`` returns."""
        groups = prod(spec.scale_shape(rows, columns))
        return rows * columns // 2 + groups // 2 + groups * spec.scale_dtype.itemsize


class GptqV1:
    """Symmetric codes of 4 or 8 bits, packed along the input channels.

    ``qweight`` int32 ``[in * bits / 32, out]``; ``qzeros`` int32 ``[groups, out * bits / 32]``, in which this version
    stores one less than the zero point; ``scales`` ``[groups, out]``; ``g_idx`` int32 ``[in]``, each channel's group.
    """

    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def tensors(self, weight: QWeight) -> dict[str, Tensor]:
        """Words, scales, and groups in their order."""
        bits, columns = weight.spec.bits, weight.codes.shape[1]
        scales = weight.scale.T.contiguous()
        below_zero = torch.full(scales.shape, -1, dtype=torch.int8)
        return {
            "qweight": pack_to_int32(weight.codes.T, bits, packed_dim=0),
            "qzeros": pack_to_int32(below_zero, bits),
            "scales": scales,
            "g_idx": torch.arange(columns, dtype=torch.int32) // weight.spec.group_size(columns),
        }

    def read(self, stored: Mapping[str, Tensor], spec: QuantSpec) -> QWeight:
        """The inverse."""
        shape = torch.Size([stored["g_idx"].numel(), stored["scales"].shape[1]])
        codes = unpack_from_int32(stored["qweight"], spec.bits, shape, packed_dim=0)
        return QWeight(codes.T.contiguous(), stored["scales"].T.contiguous(), None, spec)

    def nbytes(self, rows: int, columns: int, spec: QuantSpec) -> int:
        """Bytes of all that ``tensors`` returns."""
        groups = prod(spec.scale_shape(rows, columns))
        words = (rows * columns + groups) * spec.bits // 8
        return words + groups * spec.scale_dtype.itemsize + 4 * columns


def stored_by(layout: Layout, unit: UnitRecord) -> dict[str, Tensor]:
    """Everything of a unit, its quantized weights in a layout."""
    parts = {name: layout.tensors(weight) for name, weight in unit.quantized.items()}
    return unit.plain | {f"{name}.{part}": tensor for name, own in parts.items() for part, tensor in own.items()}


def read_by(layout: Layout, tensors: Mapping[str, Tensor], spec: QuantSpec, mark: str) -> UnitRecord:
    """The inverse of ``stored_by`` where all weights have one grid.

    ``mark`` is the part that only quantized weights have.
    """
    names = [name.removesuffix(f".{mark}") for name in tensors if name.endswith(f".{mark}")]
    own = {name: {part: tensors[f"{name}.{part}"] for part in layout.parts} for name in names}
    taken = {f"{name}.{part}" for name in names for part in layout.parts}
    plain = {name: tensor for name, tensor in tensors.items() if name not in taken}
    return UnitRecord(plain=plain, quantized={name: layout.read(parts, spec) for name, parts in own.items()})


def needed(spec: QuantSpec | None) -> QuantSpec:
    """The grid of a run in which something is quantized, as ``check`` has seen to."""
    if spec is None:
        raise ValueError("nothing is quantized")
    return spec


def group_size(spec: QuantSpec) -> int:
    """What configurations call it: -1 for one scale a row."""
    return spec.granularity.size if isinstance(spec.granularity, PerGroup) else -1


def _interleaved(values: Tensor) -> Tensor:
    """Signed nibbles ``[out, n]`` as words ``[n, out / 8]``."""
    columns = values.T.reshape(values.shape[1], -1, 8)[..., list(_ORDER)]
    words: Tensor = pack_to_int32(columns.reshape(values.shape[1], -1), 4)
    return words


def _straightened(words: Tensor) -> Tensor:
    """The inverse."""
    count, rows = words.shape[0], words.shape[1] * 8
    columns: Tensor = unpack_from_int32(words, 4, torch.Size([count, rows])).reshape(count, -1, 8)
    return columns[..., list(_INVERSE)].reshape(count, rows).T.contiguous()
