"""How ModelOpt's unified checkpoints store one Linear, by the name of its algorithm.

Names, shapes and dtypes are those of nvidia-modelopt 0.47; all scales are multiplied, and those of a whole tensor are
float32 scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from torch import Tensor

from ..quant import ActSpec, InputRange, PerChannel, PerTensor, QuantSpec, QWeight, global_scale_of, static_qparams

LARGEST_FP8 = 448.0


@dataclass(frozen=True)
class Algorithm:
    """One of TensorRT-LLM's quantization algorithms.

    Attributes:
        name: as both configuration files call it.
        pack: codes ``[out, in]`` to the stored weight.
        unpack: the inverse, to codes in a dtype.
        elements: codes in a byte.
        group: input channels in a group; None: a row or the tensor has one scale.
        scaled: whether a second, global scale belongs to a weight.
        smooth: whether a Linear that is run alone needs a scale for its input channels.
    """

    name: str
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, torch.dtype], Tensor]
    elements: int = 1
    group: int | None = None
    scaled: bool = False
    smooth: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors of a weight, by their names behind the module's."""
        return ("weight", "weight_scale", *(("weight_scale_2",) if self.scaled else ()))

    @property
    def settings(self) -> dict[str, Any]:
        """Its description in the configuration files."""
        found: dict[str, Any] = {"quant_algo": self.name}
        found |= {} if self.group is None else {"group_size": self.group}
        return found | ({"has_zero_point": False, "pre_quant_scale": True} if self.smooth else {})

    def tensors(self, weight: QWeight, fused: list[QWeight]) -> dict[str, Tensor]:
        """Stored codes and scales of a weight, given all weights that are run as one with it."""
        spec = weight.spec
        stored = {"weight": self.pack(weight.codes), "weight_scale": _stored_scale(weight.scale, spec)}
        if spec.global_scale is not None:
            stored["weight_scale_2"] = torch.tensor(spec.global_scale).reciprocal()
        elif self.scaled:
            stored["weight_scale_2"] = _fp8_scale(fused)
        return stored

    def read(self, stored: Mapping[str, Tensor], spec: QuantSpec) -> QWeight:
        """The inverse."""
        codes = self.unpack(stored["weight"], spec.code_dtype)
        scale = stored["weight_scale"].reshape(spec.scale_shape(codes.shape[0], codes.shape[1]))
        if spec.is_nvfp4:
            spec = replace(spec, global_scale=float(stored["weight_scale_2"].reciprocal()))
        return QWeight(codes, scale.to(spec.scale_dtype), None, spec)

    def nbytes(self, rows: int, columns: int, spec: QuantSpec) -> int:
        """Bytes of what ``tensors`` returns."""
        width = spec.scale_dtype.itemsize if spec.is_nvfp4 else 4
        return rows * columns // self.elements + width * prod(spec.scale_shape(rows, columns)) + 4 * self.scaled


def pack_rows(codes: Tensor) -> Tensor:
    """Signed 4-bit codes, int8 ``[out, in]``, as uint8 ``[out / 2, in]``: two's complement, the even row low."""
    halves = codes.view(torch.uint8) & 15
    return halves[0::2] | (halves[1::2] << 4)


def unpack_rows(packed: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """The inverse of ``pack_rows``."""
    halves = torch.stack([packed & 15, packed >> 4], dim=1).flatten(0, 1).to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves).to(dtype)


def _pack_pairs(codes: Tensor) -> Tensor:
    packed: Tensor = pack_fp4_to_uint8(codes.float())
    return packed


def _unpack_pairs(packed: Tensor, dtype: torch.dtype) -> Tensor:
    codes: Tensor = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1])
    return codes.to(dtype)


def _as_they_are(codes: Tensor) -> Tensor:
    return codes


W4A16 = Algorithm("W4A16_AWQ", pack_rows, unpack_rows, elements=2, group=128, smooth=True)
W4A8 = Algorithm("W4A8_AWQ", pack_rows, unpack_rows, elements=2, group=128, scaled=True, smooth=True)
FP8 = Algorithm("FP8", _as_they_are, Tensor.to)
FP8_ROWS = Algorithm("FP8_PER_CHANNEL_PER_TOKEN", _as_they_are, Tensor.to)
W8A16 = Algorithm("W8A16", _as_they_are, Tensor.to)
NVFP4 = Algorithm("NVFP4", _pack_pairs, _unpack_pairs, elements=2, group=16, scaled=True)

ALGORITHMS = {one.name: one for one in (W4A16, W4A8, FP8, FP8_ROWS, W8A16, NVFP4)}


def input_scale(act: ActSpec | None, found: InputRange | None) -> dict[str, Tensor]:
    """``input_scale`` of a calibrated range, a float32 scalar; of NVFP4 the reciprocal of the global scale."""
    if act is None or found is None:
        return {}
    if act.grid.is_nvfp4:
        return {"input_scale": torch.tensor(global_scale_of(found.magnitude)).reciprocal()}
    return {"input_scale": static_qparams(found, act.grid)[0].reshape(())}


def _stored_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Float32, but for NVFP4's; a scalar per tensor, ``[out]`` per channel."""
    stored = scale if spec.is_nvfp4 else scale.float()
    if isinstance(spec.granularity, PerTensor):
        return stored.reshape(())
    return stored.flatten() if isinstance(spec.granularity, PerChannel) else stored


def _fp8_scale(weights: list[QWeight]) -> Tensor:
    """What the largest of some weights is divided by to be e4m3's largest number: a float32 scalar."""
    largest = max(float(weight.dequantize().abs().max()) for weight in weights)
    return torch.tensor(largest / LARGEST_FP8 or 1.0)
