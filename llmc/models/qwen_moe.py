"""Qwen2-MoE and Qwen3-MoE: mixtures of experts in most blocks, plain feed-forward parts in those that the configuration
names. Qwen2-MoE has a shared expert, behind a gate of its own, which is run first."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import ModelAdapter, Subset
from .llama import residual
from .mixture import experts_of, mixture_subsets
from .parts import attention, gated

_NORM = "post_attention_layernorm"
_SHARED = "mlp.shared_expert"


def subsets2(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """Of Qwen2-MoE."""
    experts = experts_of(block, "mlp.experts")
    if not experts:
        return (*attention("input_layernorm"), *gated(_NORM))
    also = ("mlp.gate", "mlp.shared_expert_gate")
    return (
        *attention("input_layernorm"),
        *mixture_subsets(experts, prev=_NORM, also=also, shared=_SHARED, shared_first=True),
    )


def subsets3(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """Of Qwen3-MoE."""
    experts = experts_of(block, "mlp.experts")
    return (*attention("input_layernorm"), *(mixture_subsets(experts, prev=_NORM) if experts else gated(_NORM)))


_HEAD = ("model.norm", "lm_head")
QWEN2_MOE = ModelAdapter("Qwen2Moe", ("qwen2_moe",), "model.layers", _HEAD, subsets2, residual=residual)
QWEN3_MOE = ModelAdapter("Qwen3Moe", ("qwen3_moe",), "model.layers", _HEAD, subsets3, residual=residual)
