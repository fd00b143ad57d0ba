"""How one Linear is quantized: its weight, and its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .activations import ActSpec
from .spec import QuantSpec


@dataclass(frozen=True)
class Scheme:
    """The grids of one Linear.

    Attributes:
        weight: None: the Linear stays as it is.
        act: how its input is rounded; None: not at all.

    Raises:
        ValueError: a rounded input in front of a weight that isn't quantized.
    """

    weight: QuantSpec | None = None
    act: ActSpec | None = None

    def __post_init__(self) -> None:
        if self.act is not None and self.weight is None:
            raise ValueError("only quantized Linears round their input")

    def describe(self) -> str:
        """A short name such as ``W8 channel sym, A8 token sym``; empty if nothing is quantized."""
        return ", ".join(part.describe() for part in (self.weight, self.act) if part is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``metrics.json``."""
        parts = {"weight": self.weight, "act": self.act}
        return {name: None if part is None else part.to_dict() for name, part in parts.items()}
