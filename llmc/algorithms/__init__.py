"""Methods: each a short file over statistics and a view of one subset."""

from .base import (
    Algorithm,
    AttentionRanges,
    ClipRatios,
    Frame,
    InspectCalls,
    LayerNote,
    Needs,
    Options,
    Statistics,
    SubsetView,
    new_statistics,
)
from .recipe import Ignored, Recipe, Step, make_recipe
from .registry import ALGORITHMS, options_types

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AttentionRanges",
    "ClipRatios",
    "Frame",
    "Ignored",
    "InspectCalls",
    "LayerNote",
    "Needs",
    "Options",
    "Recipe",
    "Statistics",
    "Step",
    "SubsetView",
    "make_recipe",
    "new_statistics",
    "options_types",
]
