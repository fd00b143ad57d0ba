"""Llama and what is built like it: RMSNorm, rotary attention, SwiGLU."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import ModelAdapter, Residual, Subset


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """q, k, v read the first norm; o reads the values; gate and up read the second norm; down reads their product."""
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return (
        Subset(qkv, "input_layernorm", "self_attn", writes="heads"),
        Subset(("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj", reads="heads", writes="residual"),
        Subset(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp", writes="ffn"),
        Subset(("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj", reads="ffn", writes="residual"),
    )


def residual(config: PretrainedConfig) -> Residual:
    """The embedding's rows enter it, the head reads it through the last norm."""
    return Residual(("model.embed_tokens",), "model.norm", ("lm_head",))


LLAMA = ModelAdapter(
    "Llama",
    ("llama",),
    "model.layers",
    ("model.norm", "lm_head"),
    subsets,
    aliases=("SmolLM",),
    residual=residual,
)
