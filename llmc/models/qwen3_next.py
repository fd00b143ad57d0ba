"""Qwen3-Next: linear attention in three of four blocks, gated attention in the fourth, a mixture of experts in each.
Its norms multiply by ``1 + weight``."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from ..errors import ModelError
from .adapter import ModelAdapter, Residual, Subset
from .mixture import experts_of, mixture_subsets
from .parts import attention, gated

_NORM = "post_attention_layernorm"
_INPUTS = ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba")
_APART = tuple((name,) for name in _INPUTS)
_OUTPUT = "linear_attn.out_proj"


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """The norm in front of a linear attention's output has one weight for all heads, which can't absorb a scale.
    Backends run the two Linears in front of it one by one, which running the model's code doesn't show."""
    linear = (
        Subset(_INPUTS, "input_layernorm", "linear_attn", writes="inner", offset=1.0, fused=_APART),
        Subset((_OUTPUT,), None, _OUTPUT, reads="inner", writes="residual"),
    )
    first = linear if hasattr(block, "linear_attn") else attention("input_layernorm", offset=1.0)
    experts = experts_of(block, "mlp.experts")
    if not experts:
        return (*first, *gated(_NORM, offset=1.0))
    mixture = mixture_subsets(
        experts,
        prev=_NORM,
        also=("mlp.gate", "mlp.shared_expert_gate"),
        shared="mlp.shared_expert",
        shared_first=True,
        offset=1.0,
    )
    return (*first, *mixture)


def residual(config: PretrainedConfig) -> Residual:
    """It can't be rotated together with the value heads.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        "Qwen3-Next can't be rotated: its attention multiplies every channel by a gate behind the values, which a "
        "rotation of the value heads doesn't pass",
        "use a method without a rotation",
    )


QWEN3_NEXT = ModelAdapter(
    "Qwen3Next", ("qwen3_next",), "model.layers", ("model.norm", "lm_head"), subsets, residual=residual
)
