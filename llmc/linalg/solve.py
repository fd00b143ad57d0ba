"""The factor that GPTQ and SparseGPT walk along, with damping that rises when a Hessian can't be factored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InverseFactor:
    """``U`` upper triangular with ``UᵀU = (H + damp * mean(diag H) * I)⁻¹``, and the damping that it took."""

    upper: Tensor
    damp: float


@dataclass(frozen=True)
class InverseFactors:
    """The same of several matrices.

    Attributes:
        upper: ``U`` of those that could be factored, ``[found, n, n]``, in their order.
        damps: the damping of every matrix; None where none helped.
    """

    upper: Tensor
    damps: tuple[float | None, ...]

    @property
    def found(self) -> list[int]:
        """Which matrices could be factored."""
        return [index for index, damp in enumerate(self.damps) if damp is not None]

    def only(self) -> InverseFactor | None:
        """That of the single matrix."""
        (damp,) = self.damps
        return None if damp is None else InverseFactor(self.upper[0], damp)


def inverse_cholesky(hessian: Tensor, damp: float, retries: int = 3) -> InverseFactor | None:
    """Upper Cholesky factor of the inverse of a damped Gram matrix ``[n, n]``, in ``hessian``'s dtype.

    A failure multiplies the damping by ten (from 0.01 if it was 0), ``retries`` times.

    Returns:
        The factor, or None when no damping helped (a non-finite Hessian, say).
    """
    return inverse_choleskys(hessian[None], damp, retries).only()


def inverse_choleskys(hessians: Tensor, damp: float, retries: int = 3) -> InverseFactors:
    """``inverse_cholesky`` of each of ``[matrices, n, n]``; those that fail are retried on their own."""
    # An infinite pivot would pass for a weightless channel.
    means = hessians.diagonal(dim1=1, dim2=2).mean(1)
    waiting = [index for index, finite in enumerate(means.isfinite().tolist()) if finite]
    damps: list[float | None] = [None] * len(hessians)
    uppers: dict[int, Tensor] = {}
    for attempt in range(retries + 1):
        if not waiting:
            break
        tried = damp if attempt == 0 else max(damp, 1e-3) * 10.0**attempt
        every = len(waiting) == len(hessians)
        inverse, good = _attempt(hessians if every else hessians[waiting], tried * means[waiting])
        if every and all(good):
            return InverseFactors(inverse, (tried,) * len(hessians))
        for place, index in enumerate(waiting):
            if good[place]:
                uppers[index], damps[index] = inverse[place], tried
        waiting = [index for place, index in enumerate(waiting) if not good[place]]
    return InverseFactors(
        torch.stack([uppers[index] for index in sorted(uppers)]) if uppers else hessians[:0], tuple(damps)
    )


def _attempt(hessians: Tensor, added: Tensor) -> tuple[Tensor, list[bool]]:
    """The factors of ``[matrices, n, n]`` with ``added`` ``[matrices]`` on their diagonals, and which are good.

    With ``J`` the reversal, ``chol(JHJ) = L`` gives ``H = RRᵀ`` with ``R = JLJ`` upper triangular, so that ``R⁻¹`` is
    the factor sought: one factorization and one triangular inverse, instead of the customary two factorizations
    around an explicit inverse.
    """
    flipped = hessians.flip(1, 2)
    flipped.diagonal(dim1=1, dim2=2).add_(added[:, None])
    lower, failed = torch.linalg.cholesky_ex(flipped)
    upper = lower.flip(1, 2)
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
    good = (failed == 0) & inverse.isfinite().flatten(1).all(1)
    return inverse, good.tolist()


def input_factor(gram: Tensor, damp: float, order: Tensor | None = None) -> InverseFactor | None:
    """``inverse_cholesky`` of the Gram matrix ``[in, in]`` of a Linear's inputs, which is left as it is.

    Args:
        gram: a channel that is always 0 gets the diagonal 1, so that it has no say.
        damp: as for ``inverse_cholesky``.
        order: ``[in]``, the order in which the channels will be visited; None is theirs.
    """
    return input_factors([gram], damp, None if order is None else [order]).only()


def input_factors(grams: Sequence[Tensor], damp: float, orders: Sequence[Tensor] | None = None) -> InverseFactors:
    """``input_factor`` of several Gram matrices of one size, each with an order of its own."""
    hessians = grams[0].new_empty(len(grams), *grams[0].shape)
    for index, gram in enumerate(grams):
        hessians[index] = gram if orders is None else gram[orders[index]][:, orders[index]]
    diagonals = hessians.diagonal(dim1=1, dim2=2)
    diagonals[diagonals == 0] = 1.0
    return inverse_choleskys(hessians, damp)
