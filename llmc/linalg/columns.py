"""Optimal brain surgery column by column: what one column loses, the columns behind it make up for.

Several matrices of one shape, each with inputs of its own, are walked through together: a step costs one call however
many they are.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

TILE = 32  # columns whose mutual updates stay in cache


class ColumnRule(Protocol):
    """Decides what the columns of weights become. It reads them, updated so far, from the ``work`` it was made with.

    A column is updated at once within its tile, behind the tile within its block, behind the block beyond.
    """

    def begin(self, start: int, stop: int) -> None:
        """A block of columns is about to be visited; whatever comes before it has reached all columns."""
        ...

    def replace(self, column: int) -> Tensor:
        """The final values ``[matrices, out]`` of a column, in a tensor that may be overwritten."""
        ...


def replace_columns(work: Tensor, upper: Tensor, rule: ColumnRule, *, block: int, tile: int = TILE) -> None:
    """Replace every column as the rule says, and spread its error over the columns behind it.

    The error of column ``j``, ``e = (w_j - q_j) / U_jj``, is taken from column ``k`` with the weight ``U_jk``, where
    ``UᵀU`` is the inverse Hessian: the least change of the outputs (algorithm 1 of GPTQ, Frantar et al. 2022, and
    of SparseGPT, Frantar and Alistarh 2023).

    Args:
        work: the weights with their columns in front, ``[in, matrices, out]``, so that a column of all of them is
            contiguous; holds afterwards what the rule saw of each column.
        upper: ``U`` of each matrix, ``[matrices, in, in]``.
        rule: the rule.
        block: columns between two updates of all the rest.
        tile: columns between two updates of the rest of the block.
    """
    columns = len(work)
    # Tensors, not numbers: dividing by a number would multiply by its reciprocal on a GPU.
    pivots = upper.diagonal(dim1=1, dim2=2).T.neg()[..., None].unbind()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        rule.begin(start, stop)
        errors = work.new_empty(stop - start, *work.shape[1:])
        for tile_start in range(start, stop, tile):
            tile_stop = min(tile_start + tile, stop)
            corner = upper[:, tile_start:tile_stop, tile_start:tile_stop].permute(1, 2, 0)[..., None]
            for column in range(tile_start, tile_stop):
                error = rule.replace(column).sub_(work[column]).div_(pivots[column])
                errors[column - start] = error
                weights = corner[column - tile_start, column + 1 - tile_start :]
                work[column + 1 : tile_stop].addcmul_(weights, error[None], value=-1)
            done = errors[tile_start - start : tile_stop - start]
            _subtract(work[tile_stop:stop], upper[:, tile_start:tile_stop, tile_stop:stop], done)
        _subtract(work[stop:], upper[:, start:stop, stop:], errors)


def _subtract(rest: Tensor, weights: Tensor, errors: Tensor) -> None:
    """``rest`` ``[m, matrices, out]`` less ``errors`` ``[n, matrices, out]``, weighted by ``[matrices, n, m]``."""
    if len(weights) == 1:  # a batch of one may go through another kernel, which would round differently
        rest[:, 0].addmm_(weights[0].T, errors[:, 0], alpha=-1)
    else:
        rest.transpose(0, 1).baddbmm_(weights.mT, errors.transpose(0, 1), alpha=-1)
