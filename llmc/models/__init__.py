"""Architectures as data, and the function-preserving changes that they allow."""

from .adapter import Heads, ModelAdapter, Space, Subset, heads_of
from .fold import ScaleRule, fold_scale, fold_shift, scale_rule
from .registry import ADAPTERS, find_adapter

__all__ = [
    "ADAPTERS",
    "Heads",
    "ModelAdapter",
    "ScaleRule",
    "Space",
    "Subset",
    "find_adapter",
    "fold_scale",
    "fold_shift",
    "heads_of",
    "scale_rule",
]
