"""Orthogonal matrices that spread every channel over all others: randomized Hadamard matrices, or plain random ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .hadamard import Hadamard, hadamard


@dataclass(frozen=True)
class Rotation:
    """``Q`` ``[n, n]``, orthogonal, as what it takes to multiply rows by it: ``diag(signs) B R``.

    Attributes:
        signs: ``[n]`` of ±1, float64.
        basis: ``B``: a Hadamard matrix, to be divided by ``√n``, or an orthogonal matrix ``[n, n]`` float64.
        mirror: unit vector ``w`` ``[n]`` float64 of the reflection ``R = I - 2 w wᵀ``; None: no reflection.
    """

    signs: Tensor
    basis: Hadamard | Tensor
    mirror: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows @ Q`` for ``rows`` ``[..., n]``, in their dtype and on their device."""
        result = rows * self.signs.to(rows)
        if isinstance(self.basis, Hadamard):
            result = self.basis.multiply(result).div_(math.sqrt(self.basis.order))
        else:
            result = result @ self.basis.to(rows)
        if self.mirror is not None:
            mirror = self.mirror.to(rows)
            result = result - 2 * (result @ mirror)[..., None] * mirror
        return result


@dataclass(frozen=True)
class OnlineRotation:
    """``H / √n``, orthogonal, as a running model multiplies each run of ``n`` channels by it.

    Attributes:
        basis: the Hadamard matrix ``H``, of order ``n``.
        single: multiply 16-bit activations in float32.
    """

    basis: Hadamard
    single: bool = True

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows @ H / √n`` for ``rows`` ``[..., m n]``, each of the ``m`` runs by itself, in their dtype.

        Weights are given in float64.
        """
        dtype = torch.promote_types(rows.dtype, torch.float32) if self.single else rows.dtype
        runs = rows.to(dtype).reshape(-1, self.basis.order)
        return self.basis.multiply(runs).div_(math.sqrt(self.basis.order)).reshape(rows.shape).to(rows.dtype)


@lru_cache(maxsize=4)
def make_rotation(size: int, seed: int, *, random: bool = False, keeps_mean: bool = False) -> Rotation:
    """A rotation that depends on nothing but its arguments.

    Args:
        size: ``n``.
        seed: of the signs, or of the random matrix.
        random: take a random orthogonal matrix (QR of a Gaussian one) instead of a Hadamard matrix. Where no Hadamard
            matrix of order ``n`` can be constructed that is done in any case; ``hadamard`` tells beforehand.
        keeps_mean: let ``Q`` map ``(1, …, 1)`` to itself, so that it commutes with subtracting the mean of a row. A
            reflection does that to any ``Q``; a Hadamard matrix stays nearly one, except in a row where the reflection
            is concentrated, which becomes like one of a random matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    constructed = None if random else hadamard(size)
    if constructed is None:
        signs = torch.ones(size, dtype=torch.float64)
        plain = Rotation(signs, _random_orthogonal(size, generator))
    else:
        signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
        plain = Rotation(signs, constructed)
    if not keeps_mean:
        return plain
    ones = torch.full((size,), size**-0.5, dtype=torch.float64)
    away = plain(ones) - ones
    length = away.norm()
    return plain if length < 1e-12 else Rotation(plain.signs, plain.basis, away / length)


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Uniformly distributed (Mezzadri, How to generate random matrices from the classical compact groups, 2007)."""
    factor, upper = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    signed: Tensor = factor * upper.diagonal().sign()
    return signed
