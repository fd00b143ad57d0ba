"""MXFP4 experts as gpt-oss is published (``quant_method: mxfp4``).

``*_blocks`` uint8 ``[experts, out, groups, 16]`` hold two e2m1 codes a byte, the earlier one in the low half;
``*_scales`` uint8 ``[experts, out, groups]`` are exponents with a bias of 127 (OCP MX 1.0, section 5).
They become one tensor ``[experts, in, out]``, which is how the architecture keeps dense weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from torch import Tensor

from ..decoding import Decoded, DenseEntry, Entry, Stage, misshapen, missing

_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class _Experts:
    name: str
    dtype: torch.dtype

    def __call__(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks, scales = stored[f"{self.name}{_BLOCKS}"], stored[f"{self.name}{_SCALES}"]
        experts, rows, groups, size = blocks.shape
        dense = torch.empty(experts, groups * size * 2, rows, dtype=self.dtype)
        for target, packed, exponents in zip(dense, blocks, scales, strict=True):
            codes: Tensor = unpack_fp4_from_uint8(
                packed.reshape(rows * groups, size), rows * groups, size * 2, dtype=torch.float32
            )
            power = exponents.reshape(-1, 1).int() - 127
            target.copy_(torch.ldexp(codes, power).reshape(rows, -1).T)
        return {self.name: dense}


def mxfp4_stage(entries: Mapping[str, Entry], dtype: torch.dtype) -> Stage:
    """Dense experts in ``dtype``; the products fit 16 bits without rounding.

    Raises:
        CheckpointError: scales are missing or don't fit.
    """
    decoded = []
    for name, entry in entries.items():
        if not name.endswith(_BLOCKS) or entry.dtype != torch.uint8:
            continue
        own = name.removesuffix(_BLOCKS)
        scale = entries.get(f"{own}{_SCALES}")
        if scale is None:
            raise missing(name, f"{own}{_SCALES}")
        if len(entry.shape) != 4 or scale.shape != entry.shape[:3]:
            raise misshapen(name, entry.shape, scale.name, scale.shape, f"{list(entry.shape[:3])}")
        experts, rows, groups, size = entry.shape
        made = DenseEntry(own, dtype, (experts, groups * size * 2, rows))
        decoded.append(Decoded((made,), (name, scale.name), _Experts(own, dtype)))
    return Stage(tuple(decoded), f"MXFP4, decoded to {str(dtype).removeprefix('torch.')}" if decoded else "")
