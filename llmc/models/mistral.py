"""Mistral: Llama's block with a sliding window, which the recorded calls carry."""

from __future__ import annotations

from .adapter import ModelAdapter
from .llama import residual, subsets

MISTRAL = ModelAdapter("Mistral", ("mistral",), "model.layers", ("model.norm", "lm_head"), subsets, residual=residual)
