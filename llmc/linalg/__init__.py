"""Linear algebra that torch doesn't have as one call."""

from .hadamard import Hadamard, hadamard
from .rotation import Rotation, make_rotation
from .solve import InverseFactor, inverse_cholesky

__all__ = ["Hadamard", "InverseFactor", "Rotation", "hadamard", "inverse_cholesky", "make_rotation"]
