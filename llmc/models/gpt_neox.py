"""GPT-NeoX (Pythia): LayerNorm, queries, keys and values of each head side by side in one Linear."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import ModelAdapter, Residual, Subset, heads_of
from .parts import fused_attention, grouped_values, plain


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """With ``use_parallel_residual`` both norms read the same residual, but they are two: nothing is shared."""
    values = grouped_values(heads_of(config))
    return (
        *fused_attention("input_layernorm", "attention.query_key_value", "attention.dense", values),
        *plain("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    )


def residual(config: PretrainedConfig) -> Residual:
    """Positions are rotary: only words enter it."""
    return Residual(("gpt_neox.embed_in",), "gpt_neox.final_layer_norm", ("lm_head",), keeps_mean=True)


GPT_NEOX = ModelAdapter(
    "GptNeoX",
    ("gpt_neox",),
    "gpt_neox.layers",
    ("gpt_neox.final_layer_norm", "lm_head"),
    subsets,
    residual=residual,
)
