"""How a Linear may be stored: which tensors, of which shapes and dtypes, and what their values may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]
FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
INT32 = frozenset({torch.int32})
INT8 = frozenset({torch.int8})
E4M3 = frozenset({torch.float8_e4m3fn})
ONE: tuple[Shape, ...] = ((1,), (), (1, 1))


@dataclass(frozen=True)
class Part:
    """What is expected of one tensor.

    Attributes:
        shapes: any of them.
        dtypes: any of them.
        optional: whether it may be missing.
    """

    shapes: tuple[Shape, ...]
    dtypes: frozenset[torch.dtype]
    optional: bool = False

    def describe(self) -> str:
        """Dtypes and shape."""
        return f"{' or '.join(sorted(map(name_of, self.dtypes)))} {list(self.shapes[0])}"


class Layout(Protocol):
    """How one Linear is stored. Comparable: Linears that a backend fuses have equal ones."""

    def describe(self) -> str:
        """In a few words."""
        ...

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Its tensors, by their names behind the module's."""
        ...

    def problems(self, stored: Mapping[str, Tensor], shape: Shape) -> Iterator[tuple[str, str]]:
        """The part and what is wrong with its values; names, shapes and dtypes are right already.

        ``shape`` is the weight's, ``[out, in]``.
        """
        ...

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor | None:
        """The weight ``[out, in]`` as a backend sees it, in any float dtype; None: nothing here reads it."""
        ...

    @property
    def shared(self) -> tuple[str, ...]:
        """Parts whose values are equal in Linears that a backend fuses."""
        ...


def name_of(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def scale_problems(part: str, scale: Tensor) -> Iterator[tuple[str, str]]:
    """NaN, infinite and zero scales."""
    values = scale.float().reshape(-1)
    wrong = {"NaN": values.isnan(), "infinite": values.isinf(), "0": values == 0}
    for what, where in wrong.items():
        if count := int(where.sum()):
            yield part, f"{count} of {len(values)} scales {'are' if count > 1 else 'is'} {what}{_first(where, scale)}"


def range_problems(part: str, values: Tensor, low: int, high: int, what: str) -> Iterator[tuple[str, str]]:
    """Integers beyond their grid."""
    wrong = ((values < low) | (values > high)).reshape(-1)
    if count := int(wrong.sum()):
        yield part, f"{count} {what} lie outside of {low} ... {high}{_first(wrong, values)}"


def finite_problems(part: str, values: Tensor) -> Iterator[tuple[str, str]]:
    """NaN and infinite values."""
    wrong = ~values.float().isfinite().reshape(-1)
    if count := int(wrong.sum()):
        yield part, f"{count} of {len(wrong)} values are NaN or infinite{_first(wrong, values)}"


def _first(wrong: Tensor, values: Tensor) -> str:
    """Where the first is."""
    if values.ndim == 0 or values.numel() == 1:
        return ""
    flat = int(wrong.nonzero()[0])
    place = [int(index) for index in torch.unravel_index(torch.tensor(flat), values.shape)]
    return f", the first at {place}"


@dataclass(frozen=True)
class Dense:
    """A weight as it is."""

    def describe(self) -> str:
        """``dense``."""
        return "dense"

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """``weight``."""
        return {"weight": Part(((rows, columns),), FLOATS)}

    def problems(self, stored: Mapping[str, Tensor], shape: Shape) -> Iterator[tuple[str, str]]:
        """NaN and infinite values."""
        yield from finite_problems("weight", stored["weight"])

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor | None:
        """Itself."""
        return stored["weight"]

    @property
    def shared(self) -> tuple[str, ...]:
        """Nothing."""
        return ()


DENSE = Dense()

Reader = Callable[[Mapping[str, Tensor]], Tensor | None]
"""From the parts of a weight to its values."""
