"""Qwen2 (biases on q, k, v) and Qwen3 (norms on the heads of q and k), neither of which changes who reads what; and the
first Qwen, with the code that its checkpoints bring along."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import Heads, ModelAdapter, Residual, Subset
from .llama import residual, subsets
from .parts import fused_attention, stacked_values


def first_heads(config: PretrainedConfig) -> Heads:
    """As many key-value heads as query heads."""
    return Heads(config.num_attention_heads, config.num_attention_heads, config.kv_channels)


def first(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """The activation is that of ``w2``: ``w1`` absorbs a scale of the product."""
    return (
        *fused_attention("ln_1", "attn.c_attn", "attn.c_proj", stacked_values(first_heads(config))),
        Subset(("mlp.w1", "mlp.w2"), "ln_2", "mlp", writes="ffn"),
        Subset(("mlp.c_proj",), "mlp.w1", "mlp.c_proj", reads="ffn", writes="residual"),
    )


def first_residual(config: PretrainedConfig) -> Residual:
    """Llama's, by other names."""
    return Residual(("transformer.wte",), "transformer.ln_f", ("lm_head",))


QWEN = ModelAdapter(
    "Qwen",
    ("qwen",),
    "transformer.h",
    ("transformer.ln_f", "lm_head"),
    first,
    heads=first_heads,
    residual=first_residual,
)
QWEN2 = ModelAdapter("Qwen2", ("qwen2",), "model.layers", ("model.norm", "lm_head"), subsets, residual=residual)
QWEN3 = ModelAdapter("Qwen3", ("qwen3",), "model.layers", ("model.norm", "lm_head"), subsets, residual=residual)
