"""DeepSeek-V2 and -V3: latent attention (keys and values, and in the larger models queries, pass a narrow layer), and
behind the first blocks a mixture of experts with shared ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapter import Heads, ModelAdapter, Subset
from .llama import residual
from .mixture import experts_of, mixture_subsets
from .parts import gated

_OUT = "self_attn.o_proj"
_LATENT = "self_attn.kv_b_proj"


def heads(config: Any) -> Heads:
    """Of the values, each head's own."""
    return Heads(config.num_attention_heads, config.num_attention_heads, config.v_head_dim)


def attention(config: Any) -> tuple[Subset, ...]:
    """The latent keys and values have a norm; of what they become, a part of each head are its values."""
    narrow = config.q_lora_rank is not None
    first = ("self_attn.q_a_proj" if narrow else "self_attn.q_proj", "self_attn.kv_a_proj_with_mqa")
    query = "self_attn.q_b_proj"
    whole = config.qk_nope_head_dim + config.v_head_dim
    values = tuple((head * whole + config.qk_nope_head_dim, (head + 1) * whole) for head in range(heads(config).kv))
    return (
        Subset(first, "input_layernorm", "self_attn", writes="inner"),
        *([Subset((query,), "self_attn.q_a_layernorm", query, reads="inner", writes="heads")] if narrow else []),
        Subset((_LATENT,), "self_attn.kv_a_layernorm", _LATENT, reads="inner", writes="heads"),
        Subset((_OUT,), _LATENT, _OUT, reads="heads", writes="residual", rows=values),
    )


def subsets(config: Any, block: nn.Module) -> tuple[Subset, ...]:
    """The shared experts are one wider expert, which is run last."""
    experts = experts_of(block, "mlp.experts")
    if not experts:
        return (*attention(config), *gated("post_attention_layernorm"))
    mixture = mixture_subsets(experts, prev="post_attention_layernorm", shared="mlp.shared_experts")
    return (*attention(config), *mixture)


_HEAD = ("model.norm", "lm_head")
DEEPSEEK2 = ModelAdapter("DeepseekV2", ("deepseek_v2",), "model.layers", _HEAD, subsets, heads=heads, residual=residual)
DEEPSEEK3 = ModelAdapter("DeepseekV3", ("deepseek_v3",), "model.layers", _HEAD, subsets, heads=heads, residual=residual)
