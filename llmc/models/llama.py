"""Llama and what is built like it: RMSNorm, rotary attention, SwiGLU."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import ModelAdapter, Residual, Subset


def attention(offset: float = 0.0) -> tuple[Subset, ...]:
    """q, k, v read the first norm, which adds ``offset`` to its weight; o reads the values."""
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return (
        Subset(qkv, "input_layernorm", "self_attn", writes="heads", offset=offset),
        Subset(("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj", reads="heads", writes="residual"),
    )


def feed_forward(norm: str = "post_attention_layernorm", mlp: str = "mlp", offset: float = 0.0) -> tuple[Subset, ...]:
    """Gate and up read the second norm; down reads their product, which up can scale."""
    down = f"{mlp}.down_proj"
    return (
        Subset((f"{mlp}.gate_proj", f"{mlp}.up_proj"), norm, mlp, writes="ffn", offset=offset),
        Subset((down,), f"{mlp}.up_proj", down, reads="ffn", writes="residual"),
    )


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """The same in every block."""
    return (*attention(), *feed_forward())


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
