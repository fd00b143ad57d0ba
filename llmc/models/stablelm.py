"""StableLM: Llama's block with LayerNorms, or its two parts side by side behind one."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import ModelAdapter, Residual, Subset
from .parts import attention, gated, side_by_side


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """Norms of queries and keys (``qk_layernorm``) stand behind the Linears and change nothing."""
    if config.use_parallel_residual:
        return side_by_side(attention("input_layernorm"), gated("input_layernorm"))
    return (*attention("input_layernorm"), *gated("post_attention_layernorm"))


def residual(config: PretrainedConfig) -> Residual:
    """As Llama's, with LayerNorms."""
    return Residual(("model.embed_tokens",), "model.norm", ("lm_head",), keeps_mean=True)


STABLELM = ModelAdapter(
    "StableLm", ("stablelm",), "model.layers", ("model.norm", "lm_head"), subsets, residual=residual
)
