"""Which weights become zero: as many as a ratio or a pattern asks, those with the lowest score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

_PORTION = 2**24  # scores that are looked at together: selecting takes several times their memory
_FEW = 8  # scores in a row that are compared pair by pair


@dataclass(frozen=True)
class Sparsity:
    """How much of a weight is pruned.

    Attributes:
        ratio: the fraction that becomes zero, in [0, 1).
        pattern: ``(zeros, of)``: so many zeros among each ``of`` consecutive input channels of a row. This is the order
            of SparseGPT's and Wanda's code (``prunen:prunem``), where hardware's N:M counts what stays; for 2:4 and 4:8
            both are the same. None: the zeros may be anywhere.
    """

    ratio: float
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"a sparsity is in [0, 1), not {self.ratio}")
        if self.pattern is not None and (not 0 < self.pattern[0] < self.pattern[1] or not self._fits(*self.pattern)):
            raise ValueError(f"{self.pattern[0]} zeros in each {self.pattern[1]} aren't a sparsity of {self.ratio}")

    def _fits(self, zeros: int, of: int) -> bool:
        return math.isclose(zeros / of, self.ratio, abs_tol=1e-6)

    def count(self, weights: int) -> int:
        """Zeros among so many weights, rounded down (but 0.29 of 100 is 29, which a product of floats isn't)."""
        return math.floor(weights * self.ratio + 1e-6)

    def describe(self) -> str:
        """A short name such as ``50% zeros`` or ``2:4 zeros``."""
        if self.pattern is None:
            return f"{100 * self.ratio:.4g}% zeros"
        return f"{self.pattern[0]}:{self.pattern[1]} zeros"


def lowest(score: Tensor, count: int) -> Tensor:
    """Mask ``[rows, n]`` of the ``count`` lowest scores of each row; of equal ones, those that come first."""
    rows = max(1, _PORTION // score.shape[1])
    return torch.cat([_lowest(score[start : start + rows], count) for start in range(0, len(score), rows)])


def _lowest(score: Tensor, count: int) -> Tensor:
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if score.shape[1] <= _FEW:
        return _lowest_of_few(score, count)
    limit = score.kthvalue(count, dim=1, keepdim=True).values
    below, equal = score < limit, score == limit
    missing = count - below.sum(1, keepdim=True, dtype=torch.int32)
    return below | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))


def _lowest_of_few(score: Tensor, count: int) -> Tensor:
    """The same by comparing each column with each other one, faster than selecting in millions of short rows."""
    columns = score.T.contiguous()
    rank = torch.zeros(columns.shape, dtype=torch.uint8, device=score.device)
    for first, second in combinations(range(len(columns)), 2):
        ahead = columns[first] <= columns[second]
        rank[second] += ahead
        rank[first] += ~ahead
    return (rank < count).T.contiguous()


def prune_mask(score: Tensor, sparsity: Sparsity, *, compare: Literal["row", "all"]) -> Tensor:
    """The weights that become zero, bool ``[out, in]``.

    Args:
        score: ``[out, in]``, finite; the lowest go.
        sparsity: how many. A pattern is kept within every run of input channels, whatever ``compare`` says.
        compare: weights compete within their row (output channel), or all with all.

    Raises:
        ValueError: the pattern's length doesn't divide the number of input channels.
    """
    if sparsity.pattern is not None:
        zeros, of = sparsity.pattern
        if score.shape[1] % of:
            raise ValueError(f"runs of {of} don't divide {score.shape[1]} input channels")
        return lowest(score.reshape(-1, of), zeros).reshape(score.shape)
    competing = score if compare == "row" else score.reshape(1, -1)
    return lowest(competing, sparsity.count(competing.shape[1])).reshape(score.shape)
