"""Qwen2 (biases on q, k, v) and Qwen3 (norms on the heads of q and k). Neither changes who reads what."""

from __future__ import annotations

from .adapter import ModelAdapter
from .llama import residual, subsets

QWEN2 = ModelAdapter("Qwen2", ("qwen2",), "model.layers", ("model.norm", "lm_head"), subsets, residual=residual)
QWEN3 = ModelAdapter("Qwen3", ("qwen3",), "model.layers", ("model.norm", "lm_head"), subsets, residual=residual)
