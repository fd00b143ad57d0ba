"""Llama 4's text model: Llama's attention, and a mixture of experts with a shared one in some blocks. The router
weights what the experts read, not what they write."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import ModelAdapter, Subset
from .llama import residual
from .mixture import experts_of, mixture_subsets
from .parts import attention, gated

_MLP, _NORM = "feed_forward", "post_attention_layernorm"


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """The shared expert is run last."""
    experts = experts_of(block, f"{_MLP}.experts")
    if not experts:
        return (*attention("input_layernorm"), *gated(_NORM, at=_MLP))
    shared = f"{_MLP}.shared_expert"
    mixture = mixture_subsets(experts, prev=_NORM, mlp=_MLP, also=(f"{_MLP}.router",), shared=shared)
    return (*attention("input_layernorm"), *mixture)


LLAMA4 = ModelAdapter("Llama4", ("llama4_text",), "model.layers", ("model.norm", "lm_head"), subsets, residual=residual)
