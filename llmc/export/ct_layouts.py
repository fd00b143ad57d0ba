"""How compressed-tensors stores one Linear: as packed words, as the codes themselves, or as pairs of FP4 codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import ClassVar, Protocol

import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from ..quant import ActSpec, InputRange, PerTensor, QuantSpec, QWeight, global_scale_of, static_qparams


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
        down, across = spec.scale_shape(rows, columns)
        groups = down * across
        zero = 0 if spec.symmetric else -(-down * spec.bits // 32) * 4 * across
        return rows * -(-columns * spec.bits // 32) * 4 + groups * spec.scale_dtype.itemsize + zero + 16


class Codes:
    """``int-quantized``, ``float-quantized`` and ``mxfp8-quantized``: one byte a weight, whatever its bits."""

    parts: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")

    def tensors(self, weight: QWeight) -> dict[str, Tensor]:
        """int8 or float8_e4m3fn codes; scales in their own dtype, E8M0 as uint8; one per tensor is ``[1]``."""
        scale = weight.scale.reshape(1) if isinstance(weight.spec.granularity, PerTensor) else weight.scale
        return {"weight": weight.codes, "weight_scale": _as_stored(scale)}

    def read(self, stored: Mapping[str, Tensor], spec: QuantSpec) -> QWeight:
        """As they are."""
        codes = stored["weight"]
        shape = spec.scale_shape(codes.shape[0], codes.shape[1])
        return QWeight(codes, stored["weight_scale"].reshape(shape).view(spec.scale_dtype), None, spec)

    def nbytes(self, rows: int, columns: int, spec: QuantSpec) -> int:
        """Codes and scales."""
        return rows * columns + spec.scale_dtype.itemsize * prod(spec.scale_shape(rows, columns))


class Pairs:
    """``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``: two e2m1 codes a byte, the earlier one in its low half."""

    parts: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_global_scale")

    def tensors(self, weight: QWeight) -> dict[str, Tensor]:
        """Bytes ``[out, in / 2]``, scales (E8M0 as uint8) and, of NVFP4, what they are divided by: float32 ``[1]``."""
        stored = {"weight_packed": pack_fp4_to_uint8(weight.codes.float()), "weight_scale": _as_stored(weight.scale)}
        if weight.spec.global_scale is not None:
            stored["weight_global_scale"] = torch.tensor([weight.spec.global_scale])
        return stored

    def read(self, stored: Mapping[str, Tensor], spec: QuantSpec) -> QWeight:
        """Unpack."""
        packed, whole = stored["weight_packed"], stored.get("weight_global_scale")
        codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1]).to(spec.code_dtype)
        spec = spec if whole is None else replace(spec, global_scale=float(whole))
        return QWeight(codes, stored["weight_scale"].view(spec.scale_dtype), None, spec)

    def nbytes(self, rows: int, columns: int, spec: QuantSpec) -> int:
        """Bytes, scales and the global scale."""
        return rows * columns // 2 + prod(spec.scale_shape(rows, columns)) + 4 * spec.is_nvfp4


def _as_stored(scale: Tensor) -> Tensor:
    """E8M0 scales are stored as their exponents."""
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale


def input_tensors(act: ActSpec | None, found: InputRange | None) -> dict[str, Tensor]:
    """What is stored of a calibrated range, each ``[1]``; dynamic scales aren't.

    ``input_scale`` float32 and, if asymmetric, ``input_zero_point`` int8; of NVFP4 ``input_global_scale`` float32, by
    which its groups' scales are divided.
    """
    if act is None or found is None:
        return {}
    if act.grid.is_nvfp4:
        return {"input_global_scale": torch.tensor([global_scale_of(found.magnitude)])}
    scale, zero = static_qparams(found, act.grid)
    return {"input_scale": scale} | ({} if act.grid.symmetric else {"input_zero_point": zero.to(torch.int8)})


def input_nbytes(act: ActSpec | None) -> int:
    """Bytes of what ``input_tensors`` returns."""
    if act is None or act.observer is None:
        return 0
    return 4 if act.grid.symmetric else 5
