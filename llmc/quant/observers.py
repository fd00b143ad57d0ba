"""Ranges of static activation grids, found on calibration tokens as they stream by.

An observer is a small value that says how; ``accumulator`` makes what is updated. Accumulators keep a few numbers or
one histogram, never tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .affine import fake_quantize, qparams
from .spec import QuantSpec

_POINTS = 8  # values that stand for a bin
_RATIOS = 100  # shares of a range that are tried
_CHUNK = 1 << 22  # values that are counted at once


class Accumulator(Protocol):
    """What an observer has seen so far."""

    def update(self, inputs: Tensor) -> None:
        """Add tokens ``[..., in]`` of any float dtype; a 3-D tensor is ``[sequences, tokens, in]``."""

    def range(self) -> tuple[float, float]:
        """``(lo, hi)``: two float32 numbers; ``(0, 0)`` if nothing was seen."""
        ...


@dataclass(frozen=True)
class StaticMinMax:
    """The smallest and the largest value of all tokens."""

    def accumulator(self, spec: QuantSpec) -> Accumulator:
        """Two numbers."""
        return _MinMax(rate=None)


@dataclass(frozen=True)
class MovingMinMax:
    """A moving average of each sequence's smallest and largest value: ``r += rate * (new - r)``."""

    rate: float = 0.01

    def accumulator(self, spec: QuantSpec) -> Accumulator:
        """Two numbers."""
        return _MinMax(self.rate)


@dataclass(frozen=True)
class HistogramMse:
    """The range with the least expected squared error over a histogram of ``bins`` bins."""

    bins: int = 2048

    def accumulator(self, spec: QuantSpec) -> Accumulator:
        """A histogram, to be searched for ``spec``."""
        return _Histogram(self.bins, spec)


Observer = StaticMinMax | MovingMinMax | HistogramMse


class _MinMax:
    """Extremes of all sequences, or their moving average."""

    def __init__(self, rate: float | None) -> None:
        self._rate, self._range = rate, torch.zeros(2)
        self._seen = False

    def update(self, inputs: Tensor) -> None:
        """Take over each sequence's extremes."""
        for sequence in inputs if inputs.dim() == 3 else inputs[None]:
            new = torch.stack(torch.aminmax(sequence)).float().cpu()
            if not self._seen:
                self._range = new
            elif self._rate is None:
                self._range = torch.stack([self._range[0].minimum(new[0]), self._range[1].maximum(new[1])])
            else:
                self._range = self._range + self._rate * (new - self._range)
            self._seen = True

    def range(self) -> tuple[float, float]:
        """The extremes."""
        return float(self._range[0]), float(self._range[1])


class _Histogram:
    """Counts in bins ``[i * w, (i + 1) * w)`` with ``w`` a power of two that grows as the range does.

    Bins are merged in pairs, which loses nothing: the histogram, and so the range, depends neither on the order of the
    tokens nor on how they came in batches.
    """

    def __init__(self, bins: int, spec: QuantSpec) -> None:
        self._bins, self._spec = bins, spec
        self._counts = torch.zeros(0, dtype=torch.int64)
        self._first, self._exponent = 0, -149  # of the smallest float32
        self._lo = self._hi = 0.0  # a range always holds 0

    def update(self, inputs: Tensor) -> None:
        """Count values; widen and merge bins until all fit."""
        lo, hi = (float(end) for end in torch.aminmax(inputs))
        if not (math.isfinite(lo) and math.isfinite(hi)):
            return  # the block's output won't be finite either, which stops the run
        self._lo, self._hi = min(self._lo, lo), max(self._hi, hi)
        while self._last() - self._floor(self._lo) >= self._bins:
            self._double()
        first, last = self._floor(self._lo), self._last()
        new = torch.zeros(last - first + 1, dtype=torch.int64)
        for part in torch.split(inputs.flatten(), _CHUNK):
            index = torch.floor(part.double() / 2.0**self._exponent).long()  # dividing by a power of two is exact
            new += torch.bincount(index - first, minlength=len(new)).cpu()
        if len(self._counts):
            new[self._first - first :][: len(self._counts)] += self._counts
        self._counts, self._first = new, first

    def _floor(self, value: float) -> int:
        return math.floor(value / 2.0**self._exponent)

    def _last(self) -> int:
        return self._floor(self._hi)

    def _double(self) -> None:
        """Merge pairs of bins."""
        self._exponent += 1
        if len(self._counts):
            index = torch.arange(self._first, self._first + len(self._counts)).div(2, rounding_mode="floor")
            self._first = int(index[0])
            merged = torch.zeros(int(index[-1]) - self._first + 1, dtype=torch.int64)
            self._counts = merged.index_add_(0, index - self._first, self._counts)

    def range(self) -> tuple[float, float]:
        """The best range: both ends shrunk together, then the upper, then the lower one, from what is best so far."""
        if not len(self._counts):
            return 0.0, 0.0
        occupied = self._counts.nonzero().squeeze(1)
        offsets = (torch.arange(_POINTS) + 0.5) / _POINTS
        points = ((self._first + occupied)[:, None] + offsets).double() * 2.0**self._exponent
        points, weights = points.clamp(self._lo, self._hi).float(), self._counts[occupied].double()
        best = (math.inf, self._lo, self._hi)
        for ends in ("both",) if self._spec.symmetric else ("both", "upper", "lower"):
            _, from_lo, from_hi = best
            for step in range(_RATIOS, 0, -1):
                share = step / _RATIOS
                tried = (
                    from_lo * share if ends != "upper" else from_lo,
                    from_hi * share if ends != "lower" else from_hi,
                )
                error = _error(points, weights, tried, self._spec)
                if error < best[0]:
                    best = (error, *tried)
        return best[1], best[2]


def _error(points: Tensor, weights: Tensor, ends: tuple[float, float], spec: QuantSpec) -> float:
    """Sum over the bins of the mean squared error of the points that stand for them, times their counts."""
    lo, hi = torch.tensor(ends)
    rounded = fake_quantize(points, *qparams(lo, hi, spec), spec)
    return float((rounded - points).double().square().mean(1) @ weights)
