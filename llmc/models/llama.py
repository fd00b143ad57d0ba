"""Llama and what is built like it: RMSNorm, rotary attention, SwiGLU."""

from __future__ import annotations

from transformers import PretrainedConfig

from .adapter import ModelAdapter, Subset


def subsets(config: PretrainedConfig) -> tuple[Subset, ...]:
    """q, k, v read the first norm; o reads the values; gate and up read the second norm; down reads their product."""
    return (
        Subset(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn"),
        Subset(("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj", reads="heads"),
        Subset(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp"),
        Subset(("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj", reads="ffn"),
    )


LLAMA = ModelAdapter("Llama", ("llama",), "model.layers", ("model.norm", "lm_head"), subsets, aliases=("SmolLM",))
