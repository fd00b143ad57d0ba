"""Llama 4's text model: chunked and full attention, with and without a rotary embedding, which the calls carry."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from ..errors import ModelError
from .adapter import ModelAdapter, Subset
from .llama import residual
from .parts import attention, gated


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """Llama's, with the feed-forward part under another name.

    Raises:
        ModelError: the block is a mixture of experts.
    """
    feed_forward = block.get_submodule("feed_forward")
    if not hasattr(feed_forward, "gate_proj"):
        raise ModelError(
            f"the experts of a {type(feed_forward).__name__} aren't declared by the adapter Llama4",
            "use a Llama 4 whose layers are all dense",
        )
    return (*attention("input_layernorm"), *gated("post_attention_layernorm", at="feed_forward"))


LLAMA4 = ModelAdapter("Llama4", ("llama4_text",), "model.layers", ("model.norm", "lm_head"), subsets, residual=residual)
