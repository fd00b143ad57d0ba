"""Gemma 3: norms that multiply by ``1 + w``, one in front of each branch and one behind it."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from ..errors import ModelError
from .adapter import Residual, Subset


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """q, k, v read the first norm; gate and up that in front of the feed-forward."""
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return (
        Subset(qkv, "input_layernorm", "self_attn", writes="heads", offset=1.0),
        Subset(("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj", reads="heads", writes="inner"),
        Subset(("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm", "mlp", writes="ffn", offset=1.0),
        Subset(("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj", reads="ffn", writes="inner"),
    )


def residual(config: PretrainedConfig) -> Residual:
    """Nothing can rotate it.

    Raises:
        ModelError: says why.
    """
    raise ModelError(
        "the residual of Gemma can't be rotated: a norm behind each branch scales it channel by channel",
        "use a method without a rotation",
    )
