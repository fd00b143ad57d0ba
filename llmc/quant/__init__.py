"""Numbers only: grids, ranges, codes. Imports torch and nothing of ours."""

from .activations import ActSpec, InputRange, fake_quantize_inputs, static_qparams
from .affine import fake_quantize_weight, group_qparams, quantize, quantize_weight
from .clusters import ClusterGrid, ClusterQuantizer, cluster_extremes, cluster_qparams
from .floats import bind_global_scale, global_scale_of
from .groups import from_groups, over_rows, to_groups
from .kv import CacheScheme, Fp8Grid, IntGrid, KvCache, KvRanges, KvSpec, cache_qparams, cache_scales
from .linear import InputQuantizer
from .observers import Accumulator, HistogramMse, MovingMinMax, Observer, StaticMinMax
from .qweight import QWeight
from .record import InputSquares, UnitRecord
from .scheme import Scheme
from .shares import clipped_inputs, clipped_share, zero_share
from .sparsity import Sparsity, lowest, prune_mask
from .spec import (
    Granularity,
    Grid,
    MinMax,
    Mse,
    PerBlock,
    PerChannel,
    PerCluster,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    RangeSpec,
    SymMode,
)
from .straight import clipped_weight, straight_through
from .strips import squared_norm

__all__ = [
    "Accumulator",
    "ActSpec",
    "CacheScheme",
    "ClusterGrid",
    "ClusterQuantizer",
    "Fp8Grid",
    "Granularity",
    "Grid",
    "HistogramMse",
    "InputQuantizer",
    "InputRange",
    "InputSquares",
    "IntGrid",
    "KvCache",
    "KvRanges",
    "KvSpec",
    "MinMax",
    "MovingMinMax",
    "Mse",
    "Observer",
    "PerBlock",
    "PerChannel",
    "PerCluster",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QWeight",
    "QuantSpec",
    "RangeSpec",
    "Scheme",
    "Sparsity",
    "StaticMinMax",
    "SymMode",
    "UnitRecord",
    "bind_global_scale",
    "cache_qparams",
    "cache_scales",
    "clipped_inputs",
    "clipped_share",
    "clipped_weight",
    "cluster_extremes",
    "cluster_qparams",
    "fake_quantize_inputs",
    "fake_quantize_weight",
    "from_groups",
    "global_scale_of",
    "group_qparams",
    "lowest",
    "over_rows",
    "prune_mask",
    "quantize",
    "quantize_weight",
    "squared_norm",
    "static_qparams",
    "straight_through",
    "to_groups",
    "zero_share",
]
