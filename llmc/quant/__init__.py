"""Numbers only: grids, ranges, codes. Imports torch and nothing of ours."""

from .affine import fake_quantize_weight, group_qparams, quantize, quantize_weight, to_groups
from .qweight import QWeight
from .record import UnitRecord
from .sparsity import Sparsity, lowest, prune_mask
from .spec import Granularity, MinMax, Mse, PerChannel, PerGroup, PerTensor, QuantSpec, RangeSpec, SymMode

__all__ = [
    "Granularity",
    "MinMax",
    "Mse",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "QWeight",
    "QuantSpec",
    "RangeSpec",
    "Sparsity",
    "SymMode",
    "UnitRecord",
    "fake_quantize_weight",
    "group_qparams",
    "lowest",
    "prune_mask",
    "quantize",
    "quantize_weight",
    "to_groups",
]
