"""Central moments in float64, of parts of a sample that are put together afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_AT_ONCE = 2**16  # elements in float64: what fits into a cache
_RESOLUTION = 2.0**-24  # half of float32's


@dataclass(frozen=True)
class Moments:
    """Sums of powers of the deviations from the mean, float64, of as many samples as the tensors have elements.

    Attributes:
        count: values in a sample.
        mean: theirs.
        second: the sum of ``(x - mean)²``.
        third: of ``(x - mean)³``.
        fourth: of ``(x - mean)⁴``.
    """

    count: Tensor
    mean: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor

    @classmethod
    def of(cls, values: Tensor, dim: int) -> Moments:
        """Of the samples along a dimension; values of any float dtype. Two passes: first the mean, then powers."""
        deviation = values.to(torch.float64, copy=True)
        mean = deviation.mean(dim, keepdim=True)
        squares = deviation.sub_(mean).square()
        second, third = squares.sum(dim), deviation.mul_(squares).sum(dim)
        mean = mean.squeeze(dim)
        return cls(torch.full_like(mean, values.shape[dim]), mean, second, third, squares.square_().sum(dim))

    @classmethod
    def stacked(cls, parts: list[Moments]) -> Moments:
        """Those of several parts of the same samples, ``[parts, ...]``."""
        columns = zip(*((p.count, p.mean, p.second, p.third, p.fourth) for p in parts), strict=True)
        return cls(*(torch.stack(column) for column in columns))

    @classmethod
    def joined(cls, parts: list[Moments]) -> Moments:
        """Those of further samples, one behind the other, ``[samples]``."""
        columns = zip(*((p.count, p.mean, p.second, p.third, p.fourth) for p in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def merged(self, dim: int) -> Moments:
        """Of the samples along a dimension put together into one.

        With the deviation ``d`` of a part's mean from the common one, its sums become ``m2 + n d²``,
        ``m3 + 3 d m2 + n d³`` and ``m4 + 4 d m3 + 6 d² m2 + n d⁴`` (Pébay, 2008, SAND2008-6212): nothing large is
        subtracted from anything large.
        """
        count = self.count.sum(dim)
        mean = (self.count * self.mean).sum(dim) / count
        apart = self.mean - mean.unsqueeze(dim)
        second = self.second + self.count * apart**2
        third = self.third + 3 * apart * self.second + self.count * apart**3
        fourth = self.fourth + 4 * apart * self.third + 6 * apart**2 * self.second + self.count * apart**4
        return Moments(count, mean, second.sum(dim), third.sum(dim), fourth.sum(dim))

    @property
    def kurtosis(self) -> Tensor:
        """``E[((x - µ)/σ)⁴]``, 3 for a normal distribution; NaN for a sample whose values float32 can't tell apart."""
        variance = self.second / self.count
        found = self.fourth / self.count / variance.square()
        return found.where(variance > (_RESOLUTION * self.mean).square(), torch.nan)

    @property
    def energy(self) -> Tensor:
        """The sum of ``x²``."""
        return self.second + self.count * self.mean.square()


def row_moments(matrix: Tensor) -> Moments:
    """Of each row of ``[rows, columns]``, a few rows at a time: a whole weight in float64 would be four times itself.

    Raises:
        ValueError: there is no row, or no column.
    """
    if not matrix.numel():
        raise ValueError("an empty matrix has no moments")
    return Moments.joined([Moments.of(part, 1) for part in torch.split(matrix, rows_at_once(matrix.shape[1]))])


def rows_at_once(columns: int) -> int:
    """How many rows of so many columns are looked at together."""
    return max(1, _AT_ONCE // columns)
