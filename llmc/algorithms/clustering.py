"""What goes together with clusters of channels, and what doesn't."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import ConfigError
from ..quant import ActSpec, KvSpec, MinMax, PerCluster, QuantSpec
from .base import Algorithm
from .layers import Rule

_LOST = "a grid that needn't include 0 wouldn't keep pruned weights at 0"
_WHY_NOT = {
    "Quarot": "a rotation takes away the differences between channels that clusters separate",
    **dict.fromkeys(("Magnitude", "Wanda", "SparseGPT"), _LOST),
}


def check_clusters(
    chosen: Sequence[Algorithm],
    spec: QuantSpec | None,
    act: ActSpec | None,
    kv: KvSpec | None,
    rules: Sequence[Rule] = (),
) -> None:
    """Refuse clusters without a method that makes them, and such a method with what it can't do.

    Raises:
        ConfigError: names the key.
    """
    making = next((algorithm.name for algorithm in chosen if algorithm.clusters), None)
    grids = {"weight": spec, "act": None if act is None else act.grid}
    if making is None:
        _check_none_clustered(chosen, {"quant": grids} | {rule.key: _grids(rule) for rule in rules})
        return
    if rules:
        raise ConfigError(
            f"{rules[0].key}: {making} has one scheme for all layers: those that read a tensor share its clusters, and "
            "the attention's tensors belong to no layer",
            "leave mix_bits out; ignored_layers names layers whose weights stay as they are",
        )
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


def _grids(rule: Rule) -> dict[str, QuantSpec | None]:
    act = rule.scheme.act
    return {"weight": rule.scheme.weight, "act": None if act is None else act.grid}


def _check_none_clustered(chosen: Sequence[Algorithm], sections: Mapping[str, Mapping[str, QuantSpec | None]]) -> None:
    methods = [algorithm.name for algorithm in chosen]
    for section, grids in sections.items():
        for key, grid in grids.items():
            if grid is not None and isinstance(grid.granularity, PerCluster):
                raise ConfigError(
                    f"{section}.{key}.granularity: only RPTQ makes clusters of channels, not {methods}",
                    "set quant.method: RPTQ, or another granularity",
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
