"""How compressed-tensors stores one Linear: as packed words, or as the codes themselves."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import ClassVar, Protocol

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from ..quant import ActSpec, InputRange, QuantSpec, QWeight, static_qparams


class Layout(Protocol):
    """Pure functions between a Linear's record and its tensors, by their names behind the module's."""

    parts: ClassVar[tuple[str, ...]]
    """Names of tensors that belong to a quantized weight."""

    def tensors(self, weight: QWeight) -> dict[str, Tensor]:
        """What is stored of a weight."""
        ...

    def read(self, stored: Mapping[str, Tensor], spec: QuantSpec) -> QWeight:
        """The inverse."""
        ...

    def nbytes(self, rows: int, columns: int, spec: QuantSpec) -> int:
        """Bytes of all that ``tensors`` returns."""
        ...


class Packed:
    """``pack-quantized``: integer codes in 32-bit words along a row, zero points along a column."""

    parts: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def tensors(self, weight: QWeight) -> dict[str, Tensor]:
        """Words, scales in their own dtype, the shape, and zero points if there are any."""
        bits = weight.spec.bits
        stored = {
            "weight_packed": pack_to_int32(weight.codes, bits),
            "weight_scale": weight.scale,
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if weight.zero is not None:
            stored["weight_zero_point"] = pack_to_int32(weight.zero, bits, packed_dim=0)
        return stored

    def read(self, stored: Mapping[str, Tensor], spec: QuantSpec) -> QWeight:
        """Unpack."""
        shape, scale = torch.Size(stored["weight_shape"].tolist()), stored["weight_scale"]
        zero = stored.get("weight_zero_point")
        if zero is not None:
            zero = unpack_from_int32(zero, spec.bits, scale.shape, packed_dim=0)
        return QWeight(unpack_from_int32(stored["weight_packed"], spec.bits, shape), scale, zero, spec)

    def nbytes(self, rows: int, columns: int, spec: QuantSpec) -> int:
        """Words, scales, zero points and the shape."""
        groups = prod(spec.scale_shape(rows, columns))
        zero = 0 if spec.symmetric else groups * spec.bits // 8
        return rows * -(-columns * spec.bits // 32) * 4 + groups * spec.scale_dtype.itemsize + zero + 16


class Codes:
    """``int-quantized`` and ``float-quantized``: one byte a weight, scales in float32."""

    parts: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")

    def tensors(self, weight: QWeight) -> dict[str, Tensor]:
        """int8 or float8_e4m3fn codes; a scale per tensor is ``[1]``."""
        scale = weight.scale.reshape(1) if weight.scale.numel() == 1 else weight.scale
        return {"weight": weight.codes, "weight_scale": scale}

    def read(self, stored: Mapping[str, Tensor], spec: QuantSpec) -> QWeight:
        """As they are."""
        codes = stored["weight"]
        shape = spec.scale_shape(codes.shape[0], codes.shape[1])
        return QWeight(codes, stored["weight_scale"].reshape(shape), None, spec)

    def nbytes(self, rows: int, columns: int, spec: QuantSpec) -> int:
        """Codes and scales."""
        return rows * columns + 4 * prod(spec.scale_shape(rows, columns))


def input_tensors(act: ActSpec | None, found: InputRange | None) -> dict[str, Tensor]:
    """``input_scale`` float32 ``[1]`` and, if asymmetric, ``input_zero_point`` int8 ``[1]`` of a calibrated range.

    Dynamic scales aren't stored.
    """
    if act is None or found is None:
        return {}
    scale, zero = static_qparams(found, act.grid)
    return {"input_scale": scale} | ({} if act.grid.symmetric else {"input_zero_point": zero.to(torch.int8)})


def input_nbytes(act: ActSpec | None) -> int:
    """Bytes of what ``input_tensors`` returns."""
    if act is None or act.observer is None:
        return 0
    return 4 if act.grid.symmetric else 5
