"""Mixtral: Mistral's attention, a mixture of experts behind it."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import ModelAdapter, Subset
from .llama import residual
from .mixture import experts_of, mixture_subsets
from .parts import attention


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """Experts and router read the second norm."""
    mixture = mixture_subsets(experts_of(block, "mlp.experts"), prev="post_attention_layernorm")
    return (*attention("input_layernorm"), *mixture)


MIXTRAL = ModelAdapter("Mixtral", ("mixtral",), "model.layers", ("model.norm", "lm_head"), subsets, residual=residual)
