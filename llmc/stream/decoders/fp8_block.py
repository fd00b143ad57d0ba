"""FP8 weights with scales for blocks or for whole tensors (``quant_method: fp8``), as DeepSeek-V3 is published.

``weight`` float8_e4m3fn ``[.., out, in]`` and ``weight_scale_inv``, by which it is multiplied, ``[.., ceil(out / b),
ceil(in / b)]`` for blocks, or one number (DeepSeek-V3's technical report, section 3.3; the layout is that of its
published weights).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decoding import Decoded, DenseEntry, Entry, Stage, misshapen, missing

_SUFFIX = "_scale_inv"


@dataclass(frozen=True)
class _Blocks:
    """Multiplies by the scales of ``rows x columns`` blocks; None: of the whole."""

    weight: str
    size: tuple[int, int] | None
    dtype: torch.dtype

    def __call__(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        codes, scale = stored[self.weight], stored[f"{self.weight}{_SUFFIX}"].float()
        height, width = codes.shape[-2:]
        rows, columns = self.size or (height, width)
        dense = torch.empty(codes.shape, dtype=self.dtype)
        targets, sources = dense.view(-1, height, width), codes.view(-1, height, width)
        factors = scale.reshape(len(sources), math.ceil(height / rows), math.ceil(width / columns))
        for target, source, own in zip(targets, sources, factors, strict=True):
            for index, factor in enumerate(own.repeat_interleave(columns, dim=1)[:, :width]):
                strip = slice(index * rows, (index + 1) * rows)  # float32 of the whole is four times as large
                target[strip] = source[strip].float() * factor
        return {self.weight: dense}


def fp8_stage(entries: Mapping[str, Entry], quantization: Mapping[str, Any], dtype: torch.dtype) -> Stage:
    """Dense weights, multiplied in float32 and rounded to ``dtype``, of all FP8 tensors.

    Raises:
        CheckpointError: scales are missing or don't fit.
    """
    block = quantization.get("weight_block_size")
    decoded = []
    for name, entry in entries.items():
        if entry.dtype != torch.float8_e4m3fn or len(entry.shape) < 2:
            continue
        scale = entries.get(f"{name}{_SUFFIX}")
        if scale is None:
            raise missing(name, f"{name}{_SUFFIX}")
        size = None if block is None and math.prod(scale.shape) == 1 else _block(entry, scale, block)
        made = DenseEntry(name, dtype, entry.shape)
        decoded.append(Decoded((made,), (name, scale.name), _Blocks(name, size, dtype)))
    if not decoded:
        return Stage(())
    kind = "with one scale a tensor" if block is None else f"in {block[0]}x{block[1]} blocks"
    return Stage(tuple(decoded), f"FP8 {kind}, decoded to {str(dtype).removeprefix('torch.')}")


def _block(entry: Entry, scale: Entry, block: Any) -> tuple[int, int]:
    """The size of blocks, if the scales fit it."""
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise misshapen(entry.name, entry.shape, scale.name, scale.shape, "one number (no weight_block_size is given)")
    rows, columns = block
    wanted = (*entry.shape[:-2], math.ceil(entry.shape[-2] / rows), math.ceil(entry.shape[-1] / columns))
    if scale.shape != wanted:
        raise misshapen(
            entry.name, entry.shape, scale.name, scale.shape, f"{list(wanted)} (blocks of {rows}x{columns})"
        )
    return rows, columns
