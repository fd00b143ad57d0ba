"""Architectures as data, and the function-preserving changes that they allow."""

from .adapter import Encoder, Heads, Images, ModelAdapter, Residual, Space, Subset, heads_of
from .discover import BlockFacts, Discovery, discover
from .fold import ScaleRule, fold_scale, fold_shift, scale_rule, smoothed
from .registry import ADAPTERS, declared, find_adapter, refuse_foreign_layout
from .reorder import Moves, Orders, check_reorderable, gather_norms, over_query_heads, plan_moves, reorder_block
from .rotate import residual_of, rotate_block, rotate_embedding, rotate_head
from .selection import BlockSelection

__all__ = [
    "ADAPTERS",
    "BlockFacts",
    "BlockSelection",
    "Discovery",
    "Encoder",
    "Heads",
    "Images",
    "ModelAdapter",
    "Moves",
    "Orders",
    "Residual",
    "ScaleRule",
    "Space",
    "Subset",
    "check_reorderable",
    "declared",
    "discover",
    "find_adapter",
    "fold_scale",
    "fold_shift",
    "gather_norms",
    "heads_of",
    "over_query_heads",
    "plan_moves",
    "refuse_foreign_layout",
    "reorder_block",
    "residual_of",
    "rotate_block",
    "rotate_embedding",
    "rotate_head",
    "scale_rule",
    "smoothed",
]
