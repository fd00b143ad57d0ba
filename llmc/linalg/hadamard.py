"""Hadamard matrices, constructed, and products with them that use their Kronecker structure.

A Hadamard matrix has entries ±1 and ``H Hᵀ = n I``. Powers of two are Sylvester's; from a finite field with ``q``
elements Paley makes order ``q + 1`` (``q % 4 == 3``) and ``2 (q + 1)`` (``q % 4 == 1``) [Paley, On orthogonal matrices,
1933]; the Kronecker product of two is one again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

_WIDEST = 128  # rows of a dense factor of Sylvester's matrix


@dataclass(frozen=True)
class Hadamard:
    """``P₁ ⊗ P₂ ⊗ … ⊗ S``: Paley matrices of the orders ``dense``, then Sylvester's of order ``power``, a power of two.

    Attributes:
        dense: orders of the dense factors.
        power: order of Sylvester's factor.
    """

    dense: tuple[int, ...]
    power: int

    @property
    def order(self) -> int:
        """Rows and columns."""
        return math.prod(self.dense) * self.power

    def multiply(self, rows: Tensor) -> Tensor:
        """``rows @ H`` for ``rows`` ``[..., order]`` of any float dtype, which the result has.

        It is one product for each Paley factor and for each of those of order ``_WIDEST`` or less that Sylvester's is
        split into; ``H`` is never formed. Butterflies would take fewer operations, but each a pass over the memory.
        """
        right = self.order
        result = rows.reshape(-1, self.order)
        for factor in (*map(paley, self.dense), *map(sylvester, _split(self.power))):
            order, matrix = len(factor), factor.to(rows.device, rows.dtype)
            right //= order
            result = matrix.T @ result.reshape(-1, order, right) if right > 1 else result.reshape(-1, order) @ matrix
        return result.reshape(rows.shape)

    def matrix(self) -> Tensor:
        """``H`` itself, ``[order, order]`` int64."""
        result = torch.ones(1, 1, dtype=torch.int64)
        for order in self.dense:
            result = torch.kron(result, paley(order))
        return torch.kron(result, sylvester(self.power))


def _split(power: int) -> list[int]:
    """Orders of the factors of Sylvester's matrix, the largest last, where it is a plain matrix product."""
    found: list[int] = []
    while power > 1:
        found.insert(0, min(power, _WIDEST))
        power //= found[0]
    return found


@cache
def sylvester(order: int) -> Tensor:
    """Sylvester's matrix ``[order, order]`` int64, of a power of two."""
    result = torch.ones(1, 1, dtype=torch.int64)
    while len(result) < order:
        result = torch.kron(result, torch.tensor([[1, 1], [1, -1]]))
    return result


@cache
def hadamard(order: int) -> Hadamard | None:
    """The decomposition of ``order`` that is cheapest to multiply by; None if none is known to this construction."""
    if order >= 1 and order & (order - 1) == 0:
        return Hadamard((), order)
    found: Hadamard | None = None
    for first in (divisor for divisor in range(4, order + 1, 4) if order % divisor == 0):
        if first & (first - 1) == 0 or _field_of(first) is None:
            continue
        rest = hadamard(order // first)
        if rest is not None and (found is None or first + sum(rest.dense) < sum(found.dense)):
            found = Hadamard((first, *rest.dense), rest.power)
    return found


@cache
def paley(order: int) -> Tensor:
    """Paley's matrix ``[order, order]`` int64.

    Raises:
        ValueError: neither ``order - 1`` nor ``order / 2 - 1`` is a fitting prime power.
    """
    size = _field_of(order)
    if size is None:
        raise ValueError(f"Paley's constructions give no Hadamard matrix of order {order}")
    residues = _residues(size)
    core = torch.zeros(size + 1, size + 1, dtype=torch.int64)
    core[1:, 1:] = residues
    core[0, 1:] = 1
    if order == size + 1:
        core[1:, 0] = -1
        return core + torch.eye(order, dtype=torch.int64)
    core[1:, 0] = 1
    unit = torch.eye(size + 1, dtype=torch.int64)
    return torch.kron(core, torch.tensor([[1, 1], [1, -1]])) + torch.kron(unit, torch.tensor([[1, -1], [-1, -1]]))


def _field_of(order: int) -> int | None:
    """Number of elements of the field that Paley's constructions need for an order; None if there is no such field."""
    if order % 4 == 0:
        if _prime_power(order - 1) is not None:
            return order - 1
        if order // 2 % 4 == 2 and _prime_power(order // 2 - 1) is not None:
            return order // 2 - 1
    return None


def _prime_power(number: int) -> tuple[int, int] | None:
    """``(p, k)`` with ``number == p**k``."""
    prime = next((d for d in range(2, math.isqrt(number) + 1) if number % d == 0), number)
    power = 0
    while number > 1 and number % prime == 0:
        number, power = number // prime, power + 1
    return (prime, power) if number == 1 and power else None


def _residues(size: int) -> Tensor:
    """``[size, size]``: 1 where the difference of two elements of the field is a square, -1 where it isn't, 0 at 0."""
    found = _prime_power(size)
    if found is None:
        raise ValueError(f"no field has {size} elements")
    prime, degree = found
    places = torch.tensor([prime**place for place in range(degree)])
    character = torch.zeros(size, dtype=torch.int64)
    # Squares are the even powers of whatever generates the multiplicative group.
    for exponent, element in enumerate(_powers_of_x(prime, degree)):
        character[int((torch.tensor(element) * places).sum())] = 1 - 2 * (exponent % 2)
    digits = torch.arange(size)[:, None] // places % prime
    difference = torch.zeros(size, size, dtype=torch.int64)
    for place in range(degree):
        difference += (digits[:, None, place] - digits[None, :, place]) % prime * places[place]
    return character[difference]


def _powers_of_x(prime: int, degree: int) -> list[tuple[int, ...]]:
    """All nonzero elements of the field, as coefficients of polynomials over the prime field: 1, x, x², …

    The first polynomial modulo which the powers of x are all nonzero elements is primitive, hence irreducible.
    """
    one = (1, *[0] * (degree - 1))
    for reduced in product(range(prime), repeat=degree):  # x^degree as a polynomial of lower degree
        if reduced[0] == 0:
            continue  # x would divide zero
        powers, element = [one], _times_x(one, reduced, prime)
        while element != one:
            powers.append(element)
            element = _times_x(element, reduced, prime)
        if len(powers) == prime**degree - 1:
            return powers
    raise AssertionError("every finite field has a primitive polynomial")


def _times_x(element: tuple[int, ...], reduced: tuple[int, ...], prime: int) -> tuple[int, ...]:
    shifted = (0, *element[:-1])
    return tuple((below + element[-1] * part) % prime for below, part in zip(shifted, reduced, strict=True))
