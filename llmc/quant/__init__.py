"""Numbers only: grids, ranges, codes. Imports torch and nothing of ours."""

from .affine import fake_quantize_weight, group_qparams, quantize, quantize_weight, to_groups
from .kv import CacheScheme, Fp8Grid, IntGrid, KvCache, KvRanges, KvSpec, PerToken, static_qparams
from .qweight import QWeight
from .record import UnitRecord
from .spec import Granularity, MinMax, Mse, PerChannel, PerGroup, PerTensor, QuantSpec, RangeSpec, SymMode

__all__ = [
    "CacheScheme",
    "Fp8Grid",
    "Granularity",
    "IntGrid",
    "KvCache",
    "KvRanges",
    "KvSpec",
    "MinMax",
    "Mse",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QWeight",
    "QuantSpec",
    "RangeSpec",
    "SymMode",
    "UnitRecord",
    "fake_quantize_weight",
    "group_qparams",
    "quantize",
    "quantize_weight",
    "static_qparams",
    "to_groups",
]
