"""GLM and GLM-4 as Transformers has them, and ChatGLM with the code that its checkpoints bring along."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from . import llama
from .adapter import Heads, ModelAdapter, Residual, Subset
from .parts import (
    BEHIND_BRANCHES,
    attention,
    fused_attention,
    fused_gated,
    grouped_values,
    never_rotated,
    stacked_values,
    unrotatable,
)


def glm(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """``gate_up_proj`` is gate, up. GLM-4's ``post_self_attn_layernorm`` and ``post_mlp_layernorm`` feed no Linear."""
    return (
        *attention("input_layernorm"),
        *fused_gated("post_attention_layernorm", "mlp.gate_up_proj", "mlp.down_proj", config.intermediate_size),
    )


def chatglm_heads(config: PretrainedConfig) -> Heads:
    """``multi_query_attention`` stands for grouped queries."""
    query = config.num_attention_heads
    return Heads(query, config.multi_query_group_num if config.multi_query_attention else query, config.kv_channels)


def chatglm(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """Norms behind which the residual goes on (``apply_residual_connection_post_layernorm``) absorb nothing. It's
    called the residual all the same, though running a block doesn't show it: nothing passes the norms unchanged."""
    heads = chatglm_heads(config)
    carried = config.apply_residual_connection_post_layernorm
    first, second = (None, None) if carried else ("input_layernorm", "post_attention_layernorm")
    values = stacked_values(heads) if config.multi_query_attention else grouped_values(heads)
    return (
        *fused_attention(first, "self_attention.query_key_value", "self_attention.dense", values),
        *fused_gated(second, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", config.ffn_hidden_size),
    )


def chatglm_residual(config: PretrainedConfig) -> Residual:
    """RMSNorms, or, if the configuration says so, LayerNorms.

    Raises:
        ModelError: the residual goes on behind the norms, or the last one is missing.
    """
    if config.apply_residual_connection_post_layernorm:
        raise unrotatable("ChatGLM", "it goes on behind the norms, whose weights scale it channel by channel")
    if not config.post_layer_norm:
        raise unrotatable("ChatGLM", "there is no norm behind the last block")
    norm, readers = "transformer.encoder.final_layernorm", ("transformer.output_layer",)
    return Residual(("transformer.embedding.word_embeddings",), norm, readers, keeps_mean=not config.rmsnorm)


GLM = ModelAdapter("Glm", ("glm",), "model.layers", ("model.norm", "lm_head"), glm, residual=llama.residual)
GLM4 = ModelAdapter(
    "Glm4",
    ("glm4",),
    "model.layers",
    ("model.norm", "lm_head"),
    glm,
    residual=never_rotated("Glm4", BEHIND_BRANCHES),
)
CHATGLM = ModelAdapter(
    "ChatGLM",
    ("chatglm",),
    "transformer.encoder.layers",
    ("transformer.encoder.final_layernorm", "transformer.output_layer"),
    chatglm,
    heads=chatglm_heads,
    residual=chatglm_residual,
)
