"""Linear algebra that torch doesn't have as one call."""

from .columns import ColumnRule, replace_columns
from .hadamard import Hadamard, hadamard
from .kmeans import kmeans
from .rotation import OnlineRotation, Rotation, make_rotation
from .solve import InverseFactor, input_factor, inverse_cholesky

__all__ = [
    "ColumnRule",
    "Hadamard",
    "InverseFactor",
    "OnlineRotation",
    "Rotation",
    "hadamard",
    "input_factor",
    "inverse_cholesky",
    "kmeans",
    "make_rotation",
    "replace_columns",
]
