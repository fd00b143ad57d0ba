"""Gemma: norms multiply by one plus their weight; from the second generation on there is one behind each branch too.

The embedding's multiplier and the soft capping of logits are scalar or act behind the head, and change nothing here.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import PretrainedConfig

from . import llama
from .adapter import ModelAdapter, Residual, Subset
from .parts import BEHIND_BRANCHES, attention, gated, never_rotated


def first(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """Llama's block."""
    return (*attention("input_layernorm", offset=1.0), *gated("post_attention_layernorm", offset=1.0))


def later(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """``post_attention_layernorm`` and ``post_feedforward_layernorm`` feed no Linear."""
    return (*attention("input_layernorm", offset=1.0), *gated("pre_feedforward_layernorm", offset=1.0))


def residual(config: PretrainedConfig) -> Residual:
    """Llama's, with a norm that adds one to its weight."""
    return replace(llama.residual(config), offset=1.0)


refused = never_rotated("Gemma", BEHIND_BRANCHES)
"""The ``residual`` of the later generations."""


def _later(name: str, model_type: str) -> ModelAdapter:
    return ModelAdapter(name, (model_type,), "model.layers", ("model.norm", "lm_head"), later, residual=refused)


GEMMA = ModelAdapter("Gemma", ("gemma",), "model.layers", ("model.norm", "lm_head"), first, residual=residual)
GEMMA2 = _later("Gemma2", "gemma2")
GEMMA3 = _later("Gemma3", "gemma3_text")
