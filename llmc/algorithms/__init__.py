"""Methods: each a short file over statistics and a view of one subset."""

from .base import (
    Algorithm,
    ClipRatios,
    Frame,
    InspectCalls,
    LayerNote,
    Needs,
    Online,
    Options,
    Statistics,
    SubsetView,
    is_named,
    new_statistics,
)
from .recipe import Ignored, Recipe, Step, make_recipe
from .registry import ALGORITHMS, options_types

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "ClipRatios",
    "Frame",
    "Ignored",
    "InspectCalls",
    "LayerNote",
    "Needs",
    "Online",
    "Options",
    "Recipe",
    "Statistics",
    "Step",
    "SubsetView",
    "is_named",
    "make_recipe",
    "new_statistics",
    "options_types",
]
