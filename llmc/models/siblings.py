"""Families with Llama's block under Llama's names.

Granite and MiniCPM multiply embedding, branches and logits by scalars, which neither a fold nor a rotation touches.
SmolLM3 leaves out the rotary embedding in some blocks.
"""

from __future__ import annotations

from .adapter import ModelAdapter
from .llama import residual, subsets


def _sibling(name: str, model_type: str) -> ModelAdapter:
    return ModelAdapter(name, (model_type,), "model.layers", ("model.norm", "lm_head"), subsets, residual=residual)


GRANITE = _sibling("Granite", "granite")
MINICPM = _sibling("MiniCPM", "minicpm")
SMOLLM3 = _sibling("SmolLM3", "smollm3")
