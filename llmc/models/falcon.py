"""Falcon: LayerNorm, fused queries, keys and values.

Attention and feed-forward part stand side by side, behind one norm (7B) or one each (40B, 180B), or one after the other
(RW-1B). Each key-value head follows the query heads that read it; with multi-query attention there is one of it.
"""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import Heads, ModelAdapter, Residual, Subset
from .parts import fused_attention, grouped_values, plain, side_by_side


def heads(config: PretrainedConfig) -> Heads:
    """``num_kv_heads`` counts only where ``multi_query``, which the new architecture ignores, doesn't."""
    single = config.multi_query and not config.new_decoder_architecture
    kv = config.num_kv_heads if config.new_decoder_architecture else config.num_attention_heads
    return Heads(config.num_attention_heads, 1 if single else kv, config.hidden_size // config.num_attention_heads)


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """The norms that a block has say what reads them."""
    norms = dict(block.named_children())
    first = "ln_attn" if "ln_attn" in norms else "input_layernorm"
    second = next((name for name in ("ln_mlp", "post_attention_layernorm") if name in norms), first)
    values = grouped_values(heads(config))
    attention = fused_attention(first, "self_attention.query_key_value", "self_attention.dense", values)
    feed_forward = plain(second, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    return side_by_side(attention, feed_forward) if second == first else (*attention, *feed_forward)


def residual(config: PretrainedConfig) -> Residual:
    """Positions are rotary, or ALiBi's: only words enter it."""
    return Residual(("transformer.word_embeddings",), "transformer.ln_f", ("lm_head",), keeps_mean=True)


FALCON = ModelAdapter(
    "Falcon",
    ("falcon",),
    "transformer.h",
    ("transformer.ln_f", "lm_head"),
    subsets,
    heads=heads,
    residual=residual,
)
