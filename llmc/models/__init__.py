"""Architectures as data, and the function-preserving changes that they allow."""

from .adapter import Heads, ModelAdapter, Residual, Space, Subset, heads_of
from .fold import ScaleRule, fold_scale, fold_shift, scale_rule, smoothed
from .registry import ADAPTERS, find_adapter
from .rotate import residual_of, rotate_block, rotate_embedding, rotate_head
from .selection import BlockSelection

__all__ = [
    "ADAPTERS",
    "BlockSelection",
    "Heads",
    "ModelAdapter",
    "Residual",
    "ScaleRule",
    "Space",
    "Subset",
    "find_adapter",
    "fold_scale",
    "fold_shift",
    "heads_of",
    "residual_of",
    "rotate_block",
    "rotate_embedding",
    "rotate_head",
    "scale_rule",
    "smoothed",
]
