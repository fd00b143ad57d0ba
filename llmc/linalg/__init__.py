"""Linear algebra that torch doesn't have as one call."""

from .columns import ColumnRule, replace_columns
from .hadamard import Hadamard, hadamard
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
    "make_rotation",
    "replace_columns",
]
