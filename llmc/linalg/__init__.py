"""Linear algebra that torch doesn't have as one call."""

from .columns import ColumnRule, replace_columns
from .solve import InverseFactor, input_factor, inverse_cholesky

__all__ = ["ColumnRule", "InverseFactor", "input_factor", "inverse_cholesky", "replace_columns"]
