"""Methods: each a short file over statistics and a view of one subset."""

from .base import Algorithm, Frame, Needs, Online, Options, is_named
from .layers import Ignored, LayerPattern, Rule, first_scheme
from .measuring import Measuring
from .recipe import ExpertCalibration, Recipe, Step, make_recipe
from .registry import ALGORITHMS, options_types
from .shortgpt import NAME as SHORTGPT
from .shortgpt import BlockInfluence, least_influential
from .stats import AttentionRanges, Statistics, new_statistics
from .unseen import treat_unseen
from .views import BlockCalls, BlockView, ClipRatios, InspectCalls, LayerNote, SubsetView, TuneNote

__all__ = [
    "ALGORITHMS",
    "SHORTGPT",
    "Algorithm",
    "AttentionRanges",
    "BlockCalls",
    "BlockInfluence",
    "BlockView",
    "ClipRatios",
    "ExpertCalibration",
    "Frame",
    "Ignored",
    "InspectCalls",
    "LayerNote",
    "LayerPattern",
    "Measuring",
    "Needs",
    "Online",
    "Options",
    "Recipe",
    "Rule",
    "Statistics",
    "Step",
    "SubsetView",
    "TuneNote",
    "first_scheme",
    "is_named",
    "least_influential",
    "make_recipe",
    "new_statistics",
    "options_types",
    "treat_unseen",
]
