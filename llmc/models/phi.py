"""Phi: attention and feed-forward part side by side behind one LayerNorm. Phi-3: Llama's block, its Linears fused."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from . import llama
from .adapter import ModelAdapter, Residual, Subset, heads_of
from .parts import attention, fused_attention, fused_gated, plain, side_by_side, stacked_values


def phi(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """q, k, v and fc1 read the same norm."""
    return side_by_side(attention("input_layernorm", out="dense"), plain("input_layernorm", "mlp.fc1", "mlp.fc2"))


def phi_residual(config: PretrainedConfig) -> Residual:
    """The head has a bias, which nothing has to change."""
    return Residual(("model.embed_tokens",), "model.final_layernorm", ("lm_head",), keeps_mean=True)


def phi3(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """``qkv_proj`` is queries, keys, values; ``gate_up_proj`` is gate, up."""
    values = stacked_values(heads_of(config))
    return (
        *fused_attention("input_layernorm", "self_attn.qkv_proj", "self_attn.o_proj", values),
        *fused_gated("post_attention_layernorm", "mlp.gate_up_proj", "mlp.down_proj", config.intermediate_size),
    )


PHI = ModelAdapter("Phi", ("phi",), "model.layers", ("model.final_layernorm", "lm_head"), phi, residual=phi_residual)
PHI3 = ModelAdapter("Phi3", ("phi3",), "model.layers", ("model.norm", "lm_head"), phi3, residual=llama.residual)
