"""Methods: each a short file over statistics and a view of one subset."""

from .base import (
    Algorithm,
    BlockCalls,
    BlockView,
    ClipRatios,
    Frame,
    InspectCalls,
    LayerNote,
    Needs,
    Options,
    Statistics,
    SubsetView,
    TuneNote,
    new_statistics,
)
from .recipe import Ignored, Recipe, Step, make_recipe
from .registry import ALGORITHMS, options_types

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "BlockCalls",
    "BlockView",
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
    "TuneNote",
    "make_recipe",
    "new_statistics",
    "options_types",
]
