"""Linear algebra that torch doesn't have as one call."""

from .columns import ColumnRule, replace_columns
from .hadamard import Hadamard, hadamard
from .kmeans import kmeans
from .rotation import OnlineRotation, Rotation, make_rotation
from .solve import InverseFactor, InverseFactors, input_factor, input_factors, inverse_cholesky, inverse_choleskys

__all__ = [
    "ColumnRule",
    "Hadamard",
    "InverseFactor",
    "InverseFactors",
    "OnlineRotation",
    "Rotation",
    "hadamard",
    "input_factor",
    "input_factors",
    "inverse_cholesky",
    "inverse_choleskys",
    "kmeans",
    "make_rotation",
    "replace_columns",
]
