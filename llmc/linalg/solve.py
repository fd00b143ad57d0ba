"""The factor that GPTQ and SparseGPT walk along, with damping that rises when a Hessian can't be factored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InverseFactor:
    """``U`` upper triangular with ``UᵀU = (H + damp * mean(diag H) * I)⁻¹``, and the damping that it took."""

    upper: Tensor
    damp: float


def inverse_cholesky(hessian: Tensor, damp: float, retries: int = 3) -> InverseFactor | None:
    """Upper Cholesky factor of the inverse of a damped Gram matrix ``[n, n]``, in ``hessian``'s dtype.

    With ``J`` the reversal, ``chol(JHJ) = L`` gives ``H = RRᵀ`` with ``R = JLJ`` upper triangular, so that ``R⁻¹`` is
    the factor sought: one factorization and one triangular inverse, instead of the customary two factorizations
    around an explicit inverse. A failure multiplies the damping by ten (from 0.01 if it was 0), ``retries`` times.

    Returns:
        The factor, or None when no damping helped (a non-finite Hessian, say).
    """
    mean = hessian.diagonal().mean()
    if not mean.isfinite():
        return None  # an infinite pivot would pass for a weightless channel
    for attempt in range(retries + 1):
        tried = damp if attempt == 0 else max(damp, 1e-3) * 10.0**attempt
        flipped = hessian.flip(0, 1)
        flipped.diagonal().add_(tried * mean)
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed.item():
            upper = lower.flip(0, 1)
            identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
            if inverse.isfinite().all():
                return InverseFactor(inverse, tried)
    return None


def input_factor(gram: Tensor, damp: float, order: Tensor | None = None) -> InverseFactor | None:
    """``inverse_cholesky`` of the Gram matrix ``[in, in]`` of a Linear's inputs, which is left as it is.

    Args:
        gram: a channel that is always 0 gets the diagonal 1, so that it has no say.
        damp: as for ``inverse_cholesky``.
        order: ``[in]``, the order in which the channels will be visited; None is theirs.
    """
    hessian = gram.clone() if order is None else gram[order][:, order]
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    return inverse_cholesky(hessian, damp)
