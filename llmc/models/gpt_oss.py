"""gpt-oss: attention with sinks, and experts with biases and a clamped gate."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import ModelAdapter, Subset
from .llama import residual
from .mixture import experts_of, mixture_subsets
from .parts import attention


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """What ``up`` makes is clamped and 1 is added, so that no scale of an expert's last input passes it."""
    mixture = mixture_subsets(
        experts_of(block, "mlp.experts"),
        prev="post_attention_layernorm",
        also=("mlp.router",),
        up_passes=False,
    )
    return (*attention("input_layernorm"), *mixture)


GPT_OSS = ModelAdapter("GptOss", ("gpt_oss",), "model.layers", ("model.norm", "lm_head"), subsets, residual=residual)
