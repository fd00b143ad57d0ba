"""Stands in for vLLM's int4 CPU kernel on processors that it wasn't built for (it needs AVX-512).

Everything else stays vLLM's: it reads the checkpoint, fuses and repacks the codes for its kernel, and calls it; only
the product itself is then computed here, by plain torch, from the repacked codes. What this shows is that vLLM
understands the checkpoint, not that its kernel computes well.
"""

from __future__ import annotations

import torch
from torch import Tensor

_dense: dict[int, Tensor] = {}
_BLOCK = 16  # output channels that vLLM interleaves for its kernel


def gemm(
    input: Tensor,
    q_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> Tensor:
    """The operator's arguments: ``input`` ``[tokens, in]``, ``q_weight`` int32 ``[out / 16, 2 * in]``.

    ``scales`` are ``[groups, out]``, ``zeros`` int32 ``[groups, out / 8]``.
    """
    key = q_weight.data_ptr()  # a layer's weight stays where it is
    if key not in _dense:
        _dense[key] = dense(q_weight, scales, zeros, pack_factor, input.shape[-1]).to(input.dtype)
    return torch.nn.functional.linear(input, _dense[key], bias)


def dense(q_weight: Tensor, scales: Tensor, zeros: Tensor | None, pack_factor: int, columns: int) -> Tensor:
    """The weight ``[out, in]`` in float32."""
    rows, groups = scales.shape[1], scales.shape[0]
    words = q_weight.view(rows // _BLOCK, columns, _BLOCK // pack_factor)
    codes = _nibbles(words).reshape(rows // _BLOCK, columns, _BLOCK).permute(0, 2, 1).reshape(rows, columns)
    offsets = torch.full((groups, rows), 8) if zeros is None else _nibbles(zeros).reshape(groups, rows)
    size = columns // groups
    steps = scales.float().T.repeat_interleave(size, 1)
    return (codes - offsets.T.repeat_interleave(size, 1)).float() * steps


def _nibbles(words: Tensor) -> Tensor:
    return torch.stack([(words >> (4 * index)) & 15 for index in range(8)], -1)


def install() -> None:
    """Put ``gemm`` in the place of the missing operator."""
    from vllm import _custom_ops
    from vllm.model_executor.kernels.linear.mixed_precision import cpu

    _custom_ops.cpu_gemm_wna16 = gemm
    cpu.ops.cpu_gemm_wna16 = gemm
