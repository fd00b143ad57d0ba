"""StarCoder (GPT-BigCode: multi-query attention, learned positions) and StarCoder 2 (grouped queries, rotary)."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import Heads, ModelAdapter, Residual, Subset
from .parts import attention, fused_attention, grouped_values, plain


def bigcode_heads(config: PretrainedConfig) -> Heads:
    """One key-value head, or as many as query heads."""
    query = config.num_attention_heads
    return Heads(query, 1 if config.multi_query else query, config.hidden_size // query)


def bigcode(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """Without multi-query attention each head's queries, keys and values stand side by side."""
    values = grouped_values(bigcode_heads(config))
    return (
        *fused_attention("ln_1", "attn.c_attn", "attn.c_proj", values),
        *plain("ln_2", "mlp.c_fc", "mlp.c_proj"),
    )


def bigcode_residual(config: PretrainedConfig) -> Residual:
    """Token and position embeddings enter it."""
    return Residual(("transformer.wte", "transformer.wpe"), "transformer.ln_f", ("lm_head",), keeps_mean=True)


def second(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """Llama's attention, and two Linears with GELU between them."""
    return (*attention("input_layernorm"), *plain("post_attention_layernorm", "mlp.c_fc", "mlp.c_proj"))


def second_residual(config: PretrainedConfig) -> Residual:
    """As Llama's, with LayerNorms."""
    return Residual(("model.embed_tokens",), "model.norm", ("lm_head",), keeps_mean=True)


BIGCODE = ModelAdapter(
    "GptBigCode",
    ("gpt_bigcode",),
    "transformer.h",
    ("transformer.ln_f", "lm_head"),
    bigcode,
    aliases=("Starcoder",),
    heads=bigcode_heads,
    residual=bigcode_residual,
)
STARCODER2 = ModelAdapter(
    "Starcoder2",
    ("starcoder2",),
    "model.layers",
    ("model.norm", "lm_head"),
    second,
    aliases=("Starcoder",),
    residual=second_residual,
)
