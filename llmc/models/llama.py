"""Llama and what is built like it: RMSNorm, rotary attention, SwiGLU."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import ModelAdapter, Residual, Subset
from .parts import attention, gated


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """q, k, v read the first norm; o reads the values; gate and up read the second norm; down reads their product."""
    return (*attention("input_layernorm"), *gated("post_attention_layernorm"))


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
