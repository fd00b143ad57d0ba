"""BLOOM: LayerNorm, ALiBi, queries, keys and values of each head side by side in one Linear."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from ..errors import ModelError
from .adapter import ModelAdapter, Subset, heads_of
from .parts import fused_attention, grouped_values, never_rotated, plain

_EMBEDDING_NORM = "a norm stands between the embedding and the residual, and its weight scales it channel by channel"


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """Where the residual goes on behind the norms (``apply_residual_connection_post_layernorm``), they absorb nothing.
    It's called the residual all the same, though running a block doesn't show it: nothing passes the norms unchanged.

    Raises:
        ModelError: the model's code multiplies by slices of its Linears instead of calling them.
    """
    if config.pretraining_tp > 1 and config.slow_but_exact:
        raise ModelError(
            "with slow_but_exact: true BLOOM's code doesn't call its Linears",
            "set slow_but_exact: false in config.json",
        )
    carried = config.apply_residual_connection_post_layernorm
    first, second = (None, None) if carried else ("input_layernorm", "post_attention_layernorm")
    values = grouped_values(heads_of(config))
    return (
        *fused_attention(first, "self_attention.query_key_value", "self_attention.dense", values),
        *plain(second, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    )


BLOOM = ModelAdapter(
    "Bloom",
    ("bloom",),
    "transformer.h",
    ("transformer.ln_f", "lm_head"),
    subsets,
    residual=never_rotated("Bloom", _EMBEDDING_NORM),
)
