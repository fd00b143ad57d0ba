"""Stands in for vLLM's product of int8 matrices on processors without VNNI, where pairs are added in 16 bits.

Everything else stays vLLM's: it reads the checkpoint, fuses and converts weights and scales, rounds the activations,
and calls the product, which is then computed here, exactly, by plain torch. As with ``vllm_wna16``, this shows that
vLLM understands the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prepared:
    """What vLLM keeps of a layer: its weight ``[k, n]`` int8 and scales ``[n]`` or ``[1]``."""

    weight: Tensor
    scales: Tensor

    @property
    def k(self) -> int:
        return self.weight.shape[0]

    @property
    def n(self) -> int:
        return self.weight.shape[1]


def prepare(weight: Tensor, scales: Tensor, *_: object) -> Prepared:
    """The operator that prepares a layer's weight; its further arguments choose among kernels."""
    return Prepared(weight.clone(), scales.detach().float().flatten())


def multiply(
    layer: Prepared,
    codes: Tensor,
    output: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    zero_times_weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """``scale (codes - zero) weight scales + bias`` for ``codes`` ``[tokens, k]`` int8, written into ``output``."""
    centred = codes.double() if zero is None else codes.double() - zero.double()
    product = (centred @ layer.weight.double()).float() * scale.float() * layer.scales
    return output.copy_(product if bias is None else product + bias.float())


def install() -> None:
    """Put both in the places of vLLM's operators."""
    from vllm import _custom_ops

    _custom_ops.create_onednn_scaled_mm = prepare
    _custom_ops.onednn_scaled_mm = multiply
