"""Optimal brain surgery column by column: what one column loses, the columns behind it make up for."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

TILE = 32  # columns whose mutual updates stay in cache


class ColumnRule(Protocol):
    """Decides what the columns of a weight become. It reads them, updated so far, from the ``work`` it was made with.

    A column is updated at once within its tile, behind the tile within its block, behind the block beyond.
    """

    def begin(self, start: int, stop: int) -> None:
        """A block of columns is about to be visited; whatever comes before it has reached all columns."""
        ...

    def replace(self, column: int) -> Tensor:
        """The final values ``[out]`` of a column, in a tensor that may be overwritten."""
        ...


def replace_columns(work: Tensor, upper: Tensor, rule: ColumnRule, *, block: int, tile: int = TILE) -> None:
    """Replace every column as the rule says, and spread its error over the columns behind it.

    The error of column ``j``, ``e = (w_j - q_j) / U_jj``, is taken from column ``k`` with the weight ``U_jk``, where
    ``UᵀU`` is the inverse Hessian: the least change of the outputs (algorithm 1 of GPTQ, Frantar et al. 2022, and
    of SparseGPT, Frantar and Alistarh 2023).

    Args:
        work: the weight with its columns as rows, ``[in, out]``; holds afterwards what the rule saw of each column.
        upper: ``U``, ``[in, in]``.
        rule: the rule.
        block: columns between two updates of all the rest.
        tile: columns between two updates of the rest of the block.
    """
    pivots, columns = upper.diagonal().tolist(), len(work)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        rule.begin(start, stop)
        errors = work.new_empty(stop - start, work.shape[1])
        for tile_start in range(start, stop, tile):
            tile_stop = min(tile_start + tile, stop)
            for column in range(tile_start, tile_stop):
                error = rule.replace(column).sub_(work[column]).div_(-pivots[column])
                errors[column - start] = error
                work[column + 1 : tile_stop].addr_(upper[column, column + 1 : tile_stop], error, alpha=-1)
            done = errors[tile_start - start : tile_stop - start]
            work[tile_stop:stop].addmm_(upper[tile_start:tile_stop, tile_stop:stop].T, done, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
