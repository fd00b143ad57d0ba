"""What the tensors of a model look like, and how far a compressed one is from them: numbers only, on torch alone."""

from .channels import OUTLIER_RATIO, Outliers, outlier_channels
from .inputs import InputProfile, Spread
from .moments import Moments, row_moments
from .outputs import OutputComparison, decibels
from .plain import plain
from .surface import CELLS, surface

__all__ = [
    "CELLS",
    "OUTLIER_RATIO",
    "InputProfile",
    "Moments",
    "Outliers",
    "OutputComparison",
    "Spread",
    "decibels",
    "outlier_channels",
    "plain",
    "row_moments",
    "surface",
]
