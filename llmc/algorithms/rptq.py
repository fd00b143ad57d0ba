"""RPTQ (Yuan et al., 2023): channels of similar ranges share a cluster, each cluster has a static range of its own.

Five tensors of a block are clustered and, by whoever carries the result out, reordered so that a cluster is a run of
channels (sections 4.1 and 4.2): the output of the first norm (R1), queries and keys within a head (R2), values and the
attention's output within a head (R3), the output of the second norm (R4), the feed-forward's hidden channels (R5).
Weights get scales per row and cluster of their input channels, by GPTQ. Details are those of the published code as of
April 2023; what isn't there (rotary embeddings, grouped queries) is said where it's done.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..linalg import kmeans
from ..models import Heads, Subset
from ..quant import ClusterGrid, PerCluster, QuantSpec, QWeight, cluster_extremes, cluster_qparams, quantize
from .base import Algorithm, Needs, Options
from .gptq import GPTQOptions, solve
from .stats import AttentionRanges, Gram, SequenceRange, relative_error
from .views import LayerNote, SubsetView

_RATE = 0.01  # of the moving average
_NORM_BITS = 8  # at least, of a norm's output
_UNSOLVED = "the Hessian could not be factored at any damping: rounded to nearest"


class RPTQOptions(Options):
    """Options of RPTQ, by the names of its published code."""

    R1_clusters: int = Field(default=32, ge=1, description="Clusters of the first norm's output.")
    R2_clusters: int = Field(default=4, ge=1, description="Clusters of the queries and keys of a head.")
    R3_clusters: int = Field(default=4, ge=1, description="Clusters of the values and the attention output of a head.")
    R4_clusters: int = Field(default=32, ge=1, description="Clusters of the second norm's output.")
    R5_clusters: int = Field(default=32, ge=1, description="Clusters of the last feed-forward Linear's input.")
    metric: Literal["ema_minmax", "minmax"] = Field(
        default="ema_minmax",
        description="How the range of a cluster follows from its extremes in each calibration sample: a moving average "
        "in which each new sample counts 1%, or the outermost.",
    )
    only_quant_kv: bool = Field(
        default=False, description="Of the activations, quantize nothing but keys and values, the KV cache."
    )
    w_quantizer: Literal["gptq", "normal"] = Field(
        default="gptq", description="How weights are rounded: by GPTQ, or each to its nearest grid point."
    )
    percdamp: float = Field(default=0.01, ge=0, lt=1, description="Damping of GPTQ.")
    blocksize: int = Field(default=128, ge=1, description="Columns between two updates of GPTQ's remaining weights.")
    seed: int = Field(default=0, ge=0, description="Seed of k-means.")


class RPTQ(Algorithm):
    """Weight quantizer that also quantizes the activations inside a block, by clusters of channels."""

    name = "RPTQ"
    kind = "quantizer"
    options_type: ClassVar[type[Options]] = RPTQOptions
    statistics = frozenset({"gram", "sequence_range"})
    clusters = True

    def __init__(self, options: RPTQOptions) -> None:
        self.options = options

    def needs(self, *, quant_out: bool | None) -> Needs:
        """One pass of the block as it is, on inputs that carry the error of the blocks before it."""
        return Needs(data=True, compressed_stream=True if quant_out is None else quant_out)

    def cluster_count(self, subset: Subset, heads: Heads) -> int:
        """R1, R3 (of all query heads), R4 or R5."""
        if subset.reads == "heads":
            return self.options.R3_clusters * heads.query
        if subset.reads == "ffn":
            return self.options.R5_clusters
        return self.options.R1_clusters if subset.writes == "heads" else self.options.R4_clusters

    def subset(self, view: SubsetView) -> None:
        """Cluster the input, find the ranges of the tensors that the subset reads and makes, quantize the weights."""
        seen, gram = view.stats.sequence_range, view.stats.gram
        if seen is None or gram is None:
            raise ValueError("RPTQ needs the ranges and the Gram matrix of its inputs")
        labels = self._input(view, seen)
        if view.attention is not None and view.subset.writes == "heads":
            self._queries_and_keys(view, view.attention)
        specs: dict[QuantSpec, list[str]] = {}
        for name, spec in view.specs.items():
            specs.setdefault(spec, []).append(name)
        for spec, names in specs.items():
            self._weights(view, spec, names, labels.to(gram.matrix.device), gram)

    # --- activations -------------------------------------------------------------------------------------------------

    def _input(self, view: SubsetView, seen: SequenceRange) -> Tensor:
        """The grid of the subset's input, and of the values that it is made of. Returns its labels ``[in]``."""
        within = None if self.options.only_quant_kv else _bits(view)
        if view.subset.reads == "heads":
            by_head = self._within_heads(
                [_fold(seen.hi, view.heads, "max"), _fold(seen.lo, view.heads, "min")], self.options.R3_clusters
            )
            labels, values = _number(_repeat(by_head, view.heads)), _number(by_head)
            value = None if view.attention is None else view.attention.value
            view.clusters["value"] = self._grid(values, None if value is None else _bits(view), value)
        else:
            features = torch.stack([seen.hi.amax(0), seen.lo.amin(0)], dim=1)
            labels = kmeans(features, self.cluster_count(view.subset, view.heads), self.options.seed)
        if view.subset.reads == "residual" and within is not None:
            within = max(_NORM_BITS, within)
        view.clusters["input"] = self._grid(labels, within if view.specs else None, seen)
        return labels

    def _queries_and_keys(self, view: SubsetView, attention: AttentionRanges) -> None:
        """R2: queries have the order of their keys, so that products stay what they are, and ranges of their own."""
        heads, query, key = view.heads, attention.query, attention.key
        unscaled = heads.dim**0.5  # the features are those of the projection's output
        features = [
            _fold(query.hi, heads, "max") * unscaled,
            key.hi.amax(0).reshape(heads.kv, heads.dim),
            _fold(query.lo, heads, "min") * unscaled,
            key.lo.amin(0).reshape(heads.kv, heads.dim),
        ]
        by_head = self._within_heads(features, self.options.R2_clusters, pairs=not view.subset.orderable)
        within = None if self.options.only_quant_kv else _bits(view)
        view.clusters["query"] = self._grid(_number(_repeat(by_head, heads)), within, query)
        view.clusters["key"] = self._grid(_number(by_head), _bits(view), key)

    def _within_heads(self, features: list[Tensor], clusters: int, *, pairs: bool = False) -> list[Tensor]:
        """Labels ``[dim]`` of each head by features ``[heads, dim]`` each.

        With ``pairs``, the two channels that a rotary embedding turns, ``i`` and ``i + dim / 2``, have the features of
        both and share a cluster: they can change places only together, and the embedding's frequencies with them.
        """
        found = []
        for head in torch.stack(features, dim=-1):
            points = torch.cat(head.chunk(2), dim=1) if pairs else head
            labels = kmeans(points, clusters, self.options.seed)
            found.append(torch.cat([labels, labels]) if pairs else labels)
        return found

    def _grid(self, labels: Tensor, bits: int | None, seen: SequenceRange | None) -> ClusterGrid:
        if bits is None or seen is None:
            return ClusterGrid(tuple(labels.tolist()))
        rate = _RATE if self.options.metric == "ema_minmax" else None
        return ClusterGrid.of(labels, bits, seen.lo, seen.hi, rate)

    # --- weights -----------------------------------------------------------------------------------------------------

    def _weights(self, view: SubsetView, spec: QuantSpec, names: list[str], labels: Tensor, gram: Gram) -> None:
        """Round the weights on the grids of their rows' clusters, found beforehand on the original weights."""
        spec = replace(spec, granularity=PerCluster(int(labels.max()) + 1))
        weights = [view.weight(name) for name in names]
        stacked = torch.cat(weights)
        scale, zero = cluster_qparams(*cluster_extremes(stacked, stacked, labels), spec.bits, spec.scale_dtype)
        solution = None
        if self.options.w_quantizer == "gptq":
            order = GPTQOptions(actorder=False, percdamp=self.options.percdamp, blocksize=self.options.blocksize)
            solution = solve(stacked, gram.matrix, spec, order, (scale, zero), groups=labels)
        fallback = _UNSOLVED if solution is None and self.options.w_quantizer == "gptq" else None
        codes = solution.codes if solution else quantize(stacked, scale[:, labels], zero[:, labels], spec)
        rows = [len(weight) for weight in weights]
        parts = zip(*(torch.split(part, rows) for part in (codes, scale, zero)), strict=True)
        for name, weight, (own, scales, zeros) in zip(names, weights, parts, strict=True):
            quantized = QWeight.from_float(own, scales, zeros, spec, labels.int())
            error = relative_error(weight, quantized.dequantize(), gram.matrix)
            view.put(name, quantized, LayerNote(error, damp=solution.damp if solution else None, fallback=fallback))


def _bits(view: SubsetView) -> int | None:
    return None if view.clustered is None else view.clustered.grid.bits


def _fold(values: Tensor, heads: Heads, kind: Literal["max", "min"]) -> Tensor:
    """Extremes ``[kv heads, dim]`` over all sequences, and over the query heads that belong to one key-value head."""
    by_head = values.reshape(-1, heads.kv, heads.query // heads.kv, heads.dim)
    return by_head.amax((0, 2)) if kind == "max" else by_head.amin((0, 2))


def _repeat(by_head: list[Tensor], heads: Heads) -> list[Tensor]:
    """Of each key-value head, for each query head that belongs to it."""
    return [labels for labels in by_head for _ in range(heads.query // heads.kv)]


def _number(by_head: list[Tensor]) -> Tensor:
    """Labels of all heads side by side; no two heads share a cluster."""
    counts = [int(labels.max()) + 1 for labels in by_head]
    return torch.cat([labels + sum(counts[:head]) for head, labels in enumerate(by_head)])
