"""What goes together with clusters of channels, and what doesn't."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError
from ..quant import ActSpec, KvSpec, MinMax, PerCluster, QuantSpec
from .base import Algorithm

_LOST = "a grid that needn't include 0 wouldn't keep pruned weights at 0"
_WHY_NOT = {
    "Quarot": "a rotation takes away the differences between channels that clusters separate",
    **dict.fromkeys(("Magnitude", "Wanda", "SparseGPT"), _LOST),
}


def check_clusters(chosen: Sequence[Algorithm], spec: QuantSpec | None, act: ActSpec | None, kv: KvSpec | None) -> None:
    """Refuse clusters without a method that makes them, and such a method with what it can't do.

    Raises:
        ConfigError: names the key.
    """
    making = next((algorithm.name for algorithm in chosen if algorithm.clusters), None)
    grids = {"weight": spec, "act": None if act is None else act.grid}
    if making is None:
        for key, grid in grids.items():
            if grid is not None and isinstance(grid.granularity, PerCluster):
                raise ConfigError(
                    f"quant.{key}.granularity: only RPTQ makes clusters of channels, not {[a.name for a in chosen]}",
                    "set quant.method: RPTQ, or another granularity",
                )
        return
    other = next((algorithm for algorithm in chosen if not algorithm.clusters), None)
    if other is not None:
        reason = _WHY_NOT.get(other.name, "its search doesn't know scales per cluster")
        raise ConfigError(f"quant.method: {other.name} doesn't go with {making}: {reason}", f"leave out {other.name}")
    for key, grid in grids.items():
        if grid is not None:
            _check_grid(making, key, grid)
    if kv is not None:
        raise ConfigError(
            f"quant.kvcache: {making} quantizes keys and values itself, in clusters",
            "leave it out; special.only_quant_kv: True quantizes nothing but them",
        )


def _check_grid(making: str, key: str, grid: QuantSpec) -> None:
    wrong = {
        "granularity": not isinstance(grid.granularity, PerCluster),
        "bit": grid.grid != "int",
        "symmetric": grid.symmetric,
        "calib_algo": not isinstance(grid.ranges, MinMax),
    }
    bad = next((name for name, is_wrong in wrong.items() if is_wrong), None)
    if bad is not None:
        raise ConfigError(
            f"quant.{key}.{bad}: {making} has asymmetric integers with a min-max range for each cluster of channels",
            f"write {key}: {{bit: 4, symmetric: False, granularity: per_cluster}}",
        )
