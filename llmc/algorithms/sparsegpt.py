"""SparseGPT (Frantar and Alistarh, 2023): prune column by column; the columns behind make up for what is lost.

The loop is GPTQ's (``linalg.replace_columns``); only what a column becomes differs. Masks are chosen on the way, for a
block of columns at a time, from the weights as all updates so far have left them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..linalg import InverseFactor, input_factor, replace_columns
from ..linalg.columns import TILE
from ..quant import Sparsity, lowest, prune_mask
from .base import Algorithm, Needs, Options
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
        if view.stats.gram is None:
            raise ValueError("SparseGPT needs the Gram matrix of its inputs")
        if not view.sparsity:
            return
        gram = view.stats.gram.matrix
        reached = view.stats.gram.tokens > 0
        factor = input_factor(gram, self.options.percdamp) if reached else None
        dead = gram.diagonal() == 0
        for name, sparsity in view.sparsity.items():
            weight = view.linears[name].weight.detach().float()
            if factor is None:
                mask = prune_mask(weight.abs(), sparsity, compare="all")
                cause = "the Hessian could not be factored at any damping" if reached else "no calibration token"
                why = f"{cause}: pruned by magnitude"
                note = LayerNote(relative_error(weight, weight.masked_fill(mask, 0), None), fallback=why)
                view.prune(name, weight, mask, note)
            else:
                solved, mask = solve(weight.masked_fill(dead, 0), factor, sparsity, self.options.blocksize)
                view.prune(name, solved, mask, LayerNote(relative_error(weight, solved, gram), damp=factor.damp))


@dataclass
class _Pruning:
    """What SparseGPT makes of a column: the same, without the weights whose loss costs least.

    Attributes:
        work: the updated weight, ``[in, out]``.
        pivots: ``[in, 1]``, the factor's diagonal.
        sparsity: how much is pruned.
        mask: ``[in, out]``, found so far.
    """

    work: Tensor
    pivots: Tensor
    sparsity: Sparsity
    mask: Tensor

    def begin(self, start: int, stop: int) -> None:
        """Choose the block's mask: its weights compete over all rows. A pattern's runs wait for the last updates."""
        if self.sparsity.pattern is None:
            score = self._score(start, stop).reshape(1, -1)
            found = lowest(score, self.sparsity.count(score.shape[1]))
            self.mask[start:stop] = found.reshape(self.work.shape[1], -1).T

    def replace(self, column: int) -> Tensor:
        """The column with zeros; in front of a run, choose the run's mask."""
        if self.sparsity.pattern is not None and column % self.sparsity.pattern[1] == 0:
            zeros, of = self.sparsity.pattern
            self.mask[column : column + of] = lowest(self._score(column, column + of), zeros).T
        return self.work[column].masked_fill(self.mask[column], 0)

    def _score(self, start: int, stop: int) -> Tensor:
        """The loss of each weight, ``w² / U_jj²``, as ``[out, stop - start]``."""
        return (self.work[start:stop] / self.pivots[start:stop]).square_().T


def solve(weight: Tensor, factor: InverseFactor, sparsity: Sparsity, blocksize: int) -> tuple[Tensor, Tensor]:
    """Prune ``weight`` ``[out, in]`` (float32) against the inverse Hessian of its inputs.

    Args:
        weight: float32; 0 where the input channel is always 0.
        factor: ``U`` with ``UᵀU`` the damped inverse.
        sparsity: how much; of a run of a pattern as many in every row, else of each block as many over all rows.
        blocksize: columns whose mask is chosen at once. With a pattern it changes nothing but rounding.

    Returns:
        The weight with its zeros, and the mask of them.

    Raises:
        ValueError: the pattern's length doesn't divide the number of input channels.
    """
    run = 1 if sparsity.pattern is None else sparsity.pattern[1]
    if weight.shape[1] % run:
        raise ValueError(f"runs of {run} don't divide {weight.shape[1]} input channels")
    # A run must have got every update when its mask is chosen, so it may not straddle a tile.
    tile, block = run * max(1, TILE // run), run * max(1, blocksize // run)
    work = weight.T.clone(memory_format=torch.contiguous_format)
    mask = torch.zeros_like(work, dtype=torch.bool)
    rule = _Pruning(work, factor.upper.diagonal()[:, None], sparsity, mask)
    replace_columns(work, factor.upper, rule, block=block, tile=tile)
    return work.masked_fill_(mask, 0).T.contiguous(), mask.T.contiguous()
