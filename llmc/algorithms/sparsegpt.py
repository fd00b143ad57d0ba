"""SparseGPT (Frantar and Alistarh, 2023): prune column by column; the columns behind make up for what is lost.

The loop is GPTQ's (``linalg.replace_columns``); only what a column becomes differs. Masks are chosen on the way, for a
block of columns at a time, from the weights as all updates so far have left them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..linalg import InverseFactor, input_factors, replace_columns
from ..linalg.columns import TILE
from ..quant import Sparsity, lowest, prune_mask
from .base import Algorithm, Needs, Options
from .columnwise import chunks
from .stats import relative_error
from .views import LayerNote, SubsetView


class SparseGPTOptions(Options):
    """Options of SparseGPT, by the names that GPTQ's have."""

    percdamp: float = Field(default=0.01, ge=0, lt=1, description="Damping, as a share of the Hessian's mean diagonal.")
    blocksize: int = Field(
        default=128,
        ge=1,
        description="Columns whose mask is chosen at once, over all rows; rounded to whole runs of a pattern.",
    )
    true_sequential: bool = Field(
        default=False, description="A subset's Hessian comes from inputs that the block's pruned subsets produced."
    )


class SparseGPT(Algorithm):
    """Pruner by second-order error compensation."""

    name = "SparseGPT"
    kind = "pruner"
    options_type: ClassVar[type[Options]] = SparseGPTOptions
    statistics = frozenset({"gram"})

    def __init__(self, options: SparseGPTOptions) -> None:
        self.options = options

    def needs(self, *, quant_out: bool | None) -> Needs:
        """As published, the pruned blocks' outputs calibrate the next one."""
        compressed = True if quant_out is None else quant_out
        return Needs(data=True, sequential=self.options.true_sequential, compressed_stream=compressed)

    def subset(self, view: SubsetView) -> None:
        """Prune each Linear along the shared factor; by magnitude where no damping makes the Hessian regular."""
        self.solve([view])

    def solve(self, views: Sequence[SubsetView]) -> None:
        """The same for several subsets: what is alike in shape goes through one column loop."""
        alike: dict[tuple[tuple[torch.Size, Sparsity], ...], list[SubsetView]] = {}
        for view in views:
            if view.stats.gram is None:
                raise ValueError("SparseGPT needs the Gram matrix of its inputs")
            shares = tuple((view.linears[name].weight.shape, share) for name, share in view.sparsity.items())
            if shares and view.stats.gram.tokens == 0:
                _by_magnitude(view, "no calibration token")
            elif shares:
                alike.setdefault(shares, []).append(view)
        for shares, group in alike.items():
            elements = group[0].columns * (group[0].columns + max(shape[0] for shape, _ in shares))
            for chunk in chunks(group, elements, _gram(group[0]).device):
                self._solve(chunk)

    def _solve(self, views: Sequence[SubsetView]) -> None:
        factors = input_factors([_gram(view) for view in views], self.options.percdamp)
        factored = [views[index] for index in factors.found]
        for view in (view for view, damp in zip(views, factors.damps, strict=True) if damp is None):
            _by_magnitude(view, "the Hessian could not be factored at any damping")
        damps = [damp for damp in factors.damps if damp is not None]
        for names in zip(*(view.sparsity for view in factored), strict=True):
            sparsity = factored[0].sparsity[names[0]]
            weights = [
                view.weight(name).masked_fill(_gram(view).diagonal() == 0, 0)
                for view, name in zip(factored, names, strict=True)
            ]
            found = solve_all(weights, factors.upper, sparsity, self.options.blocksize)
            for view, name, damp, (solved, mask) in zip(factored, names, damps, found, strict=True):
                error = relative_error(view.weight(name), solved, _gram(view))
                view.prune(name, solved, mask, LayerNote(error, damp=damp))


def _gram(view: SubsetView) -> Tensor:
    if view.stats.gram is None:
        raise ValueError("SparseGPT needs the Gram matrix of its inputs")
    return view.stats.gram.matrix


def _by_magnitude(view: SubsetView, cause: str) -> None:
    for name, sparsity in view.sparsity.items():
        weight = view.weight(name)
        mask = prune_mask(weight.abs(), sparsity, compare="all")
        note = LayerNote(
            relative_error(weight, weight.masked_fill(mask, 0), None), fallback=f"{cause}: pruned by magnitude"
        )
        view.prune(name, weight, mask, note)


@dataclass
class _Pruning:
    """What SparseGPT makes of a column: the same, without the weights whose loss costs least.

    Attributes:
        work: the updated weights, ``[in, matrices, out]``.
        pivots: ``[in, matrices, 1]``, the factors' diagonals.
        sparsity: how much is pruned.
        mask: ``[in, matrices, out]``, found so far.
    """

    work: Tensor
    pivots: Tensor
    sparsity: Sparsity
    mask: Tensor

    def begin(self, start: int, stop: int) -> None:
        """Choose the block's mask: its weights compete over all rows. A pattern's runs wait for the last updates."""
        if self.sparsity.pattern is None:
            score = self._score(start, stop)
            found = lowest(score.flatten(1), self.sparsity.count(score[0].numel()))
            self.mask[start:stop] = found.view(score.shape).permute(2, 0, 1)

    def replace(self, column: int) -> Tensor:
        """The column with zeros; in front of a run, choose the run's mask."""
        if self.sparsity.pattern is not None and column % self.sparsity.pattern[1] == 0:
            zeros, of = self.sparsity.pattern
            score = self._score(column, column + of)
            self.mask[column : column + of] = lowest(score.flatten(0, 1), zeros).view(score.shape).permute(2, 0, 1)
        return self.work[column].masked_fill(self.mask[column], 0)

    def _score(self, start: int, stop: int) -> Tensor:
        """The loss of each weight, ``w² / U_jj²``, as ``[matrices, out, stop - start]``."""
        return (self.work[start:stop] / self.pivots[start:stop]).square_().permute(1, 2, 0)


def solve(weight: Tensor, factor: InverseFactor, sparsity: Sparsity, blocksize: int) -> tuple[Tensor, Tensor]:
    """``solve_all`` of one weight ``[out, in]``."""
    return solve_all([weight], factor.upper[None], sparsity, blocksize)[0]


def solve_all(
    weights: Sequence[Tensor], upper: Tensor, sparsity: Sparsity, blocksize: int
) -> list[tuple[Tensor, Tensor]]:
    """Prune weights of one shape, each against the inverse Hessian of its own inputs.

    Args:
        weights: ``[out, in]`` float32; 0 where the input channel is always 0.
        upper: ``U`` of each, ``[matrices, in, in]``, with ``UᵀU`` the damped inverse.
        sparsity: how much; of a run of a pattern as many in every row, else of each block as many over all rows.
        blocksize: columns whose mask is chosen at once. With a pattern it changes nothing but rounding.

    Returns:
        Each weight with its zeros, and the mask of them.

    Raises:
        ValueError: the pattern's length doesn't divide the number of input channels.
    """
    run, columns = 1 if sparsity.pattern is None else sparsity.pattern[1], weights[0].shape[1]
    if columns % run:
        raise ValueError(f"runs of {run} don't divide {columns} input channels")
    # A run must have got every update when its mask is chosen, so it may not straddle a tile.
    tile, block = run * max(1, TILE // run), run * max(1, blocksize // run)
    work = torch.stack([weight.T for weight in weights], dim=1)
    mask = torch.zeros_like(work, dtype=torch.bool)
    rule = _Pruning(work, upper.diagonal(dim1=1, dim2=2).T[..., None], sparsity, mask)
    replace_columns(work, upper, rule, block=block, tile=tile)
    work.masked_fill_(mask, 0)
    return [(work[:, index].T.contiguous(), mask[:, index].T.contiguous()) for index in range(len(weights))]
