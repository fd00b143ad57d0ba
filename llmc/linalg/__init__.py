"""Linear algebra that torch doesn't have as one call."""

from .solve import InverseFactor, inverse_cholesky

__all__ = ["InverseFactor", "inverse_cholesky"]
