"""Channels in clusters: one range for all channels of a cluster, wherever they stand (RPTQ, Yuan et al. 2023).

The grid belongs to channels, so a reordering that makes each cluster a run of consecutive channels changes no value; it
makes them fast to round. The convention is that of the published code (``cluster_qparams``), for activations and
weights alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .affine import store

_SCALES = (1e-4, 1e4)
_FARTHEST = 1e4
_REACH = 0.99 * _FARTHEST  # leaves room for a scale that is rounded down to its stored dtype


def cluster_qparams(
    lo: Tensor, hi: Tensor, bits: int, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ranges of any shape, float32 holding the values as they are stored.

    ``s = (hi - lo) 2^-b`` within 1e-4 and 1e4, ``z = round(-(lo + hi) / 2s)`` within +-1e4. The range isn't made to
    include 0: a channel far from it keeps its resolution, and the zero point needs 16 bits. Steps are ``2^b``, not
    ``2^b - 1``, so that the upper end is rounded down by one step.

    The published code clamps zero points that would lie beyond 1e4, which moves the whole range to about ``1e4 s``: a
    cluster of one weight above 1 comes out as 1. Here the scale grows instead, until the zero point reaches.
    """
    lo, hi = lo.float(), hi.float()
    middle = (lo + hi) / 2
    reaching = torch.maximum(((hi - lo) * 2.0**-bits).clamp(*_SCALES), middle.abs() / _REACH)
    scale = store(reaching, scale_dtype)
    return scale, (-middle / scale).clamp(-_FARTHEST, _FARTHEST).round()


def cluster_extremes(lo: Tensor, hi: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Extremes of clusters, ``[rows, clusters]`` each, from those of channels ``[rows, channels]``; ``labels``
    ``[channels]`` int64 has every number from 0 on."""
    count = int(labels.max()) + 1
    index = labels.expand_as(lo)
    low = lo.new_full((len(lo), count), torch.inf).scatter_reduce(1, index, lo, "amin")
    high = hi.new_full((len(hi), count), -torch.inf).scatter_reduce(1, index, hi, "amax")
    return low, high


def moving(values: Tensor, rate: float) -> Tensor:
    """Moving average ``r += rate * (new - r)`` over the rows of ``[rows, n]``, from the first; computed in float64."""
    result = values[0].double()
    for row in values[1:]:
        result = result + rate * (row.double() - result)
    return result.float()


@dataclass(frozen=True)
class ClusterGrid:
    """How one tensor is quantized, as plain values that JSON keeps exactly.

    Attributes:
        labels: the cluster of each channel; every number from 0 on occurs.
        bits: 2 to 8; None: the tensor stays as it is, and only its clusters are of use (to the weights that read it).
        lo, hi: the range of each cluster, float32 numbers; empty without ``bits``.
    """

    labels: tuple[int, ...]
    bits: int | None = None
    lo: tuple[float, ...] = ()
    hi: tuple[float, ...] = ()

    @classmethod
    def of(cls, labels: Tensor, bits: int | None, lo: Tensor, hi: Tensor, rate: float | None) -> ClusterGrid:
        """The grid of a tensor, from its channels' extremes in each sequence, ``[sequences, channels]`` each.

        ``rate`` is that of a moving average over the sequences of the clusters' extremes; None: the outermost.
        """
        plain = tuple(labels.tolist())
        if bits is None:
            return cls(plain)
        low, high = cluster_extremes(lo, hi, labels)
        ends = (low.amin(0), high.amax(0)) if rate is None else (moving(low, rate), moving(high, rate))
        return cls(plain, bits, *(tuple(end.tolist()) for end in ends))

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ClusterGrid:
        """The inverse of ``dataclasses.asdict``, also of what has been through JSON."""
        return cls(tuple(plain["labels"]), plain["bits"], tuple(plain["lo"]), tuple(plain["hi"]))

    @property
    def order(self) -> Tensor:
        """The channels cluster by cluster, each cluster's in their old order, ``[channels]`` int64."""
        return torch.tensor(self.labels).argsort(stable=True)


class ClusterQuantizer:
    """Rounds a tensor with a grid that has ``bits``.

    Args:
        grid: the grid.
        device: of the tensors.
        order: the channel at each of their places, ``[channels]`` int64; None: they come as the grid knows them.
    """

    def __init__(self, grid: ClusterGrid, device: torch.device, order: Tensor | None = None) -> None:
        if grid.bits is None:
            raise ValueError("a grid without bits rounds nothing")
        labels = torch.tensor(grid.labels)
        labels = labels if order is None else labels[order]
        scale, zero = cluster_qparams(torch.tensor(grid.lo), torch.tensor(grid.hi), grid.bits)
        self._scale, self._zero = scale[labels].to(device), zero[labels].to(device)
        self._last = 2 ** (grid.bits - 1) - 1

    def __call__(self, values: Tensor) -> Tensor:
        """``values`` ``[..., channels]`` on the grid, computed in float32, in their dtype."""
        codes = (values.float() / self._scale).round_().add_(self._zero).clamp_(-self._last - 1, self._last)
        return codes.sub_(self._zero).mul_(self._scale).to(values.dtype)
