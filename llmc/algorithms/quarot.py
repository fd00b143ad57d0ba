"""QuaRot (Ashkboos et al., 2024): rotate the residual and the value heads, so that no channel stands out.

Only what is merged into the weights: R1 (residual) and R2 (values). The rotations that would have to run with the
model, R3 (queries and keys) and R4 (input of the last feed-forward Linear), are left out, so that the result is an
ordinary checkpoint of the same architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from ..linalg import Rotation, hadamard, make_rotation
from ..models import rotate_block, rotate_embedding, rotate_head
from .base import Algorithm, Frame, Needs, Options


class QuarotOptions(Options):
    """Options of QuaRot, by LLMC's names."""

    rotate_mode: Literal["hadamard", "random"] = Field(
        default="hadamard", description="hadamard: with random signs; random: any orthogonal matrix, usually worse."
    )
    online_rotate: bool = Field(
        default=False, description="Rotations that run with the model; not available, the offline ones are always done."
    )
    fp32_had: Any = Field(default=None, description="Precision of online rotations; ignored.")

    @field_validator("online_rotate")
    @classmethod
    def _offline_only(cls, value: bool) -> bool:
        if value:
            raise ValueError(
                "True isn't available in this version: R3 and R4 would have to run with the model; remove it, "
                "R1 and R2 are merged into the weights in any case"
            )
        return value


class Quarot(Algorithm):
    """A transform without data: weights are rotated as they're loaded."""

    name = "Quarot"
    kind = "transform"
    options_type: ClassVar[type[Options]] = QuarotOptions

    def __init__(self, options: QuarotOptions) -> None:
        self.options = options

    def needs(self, *, quant_out: bool | None) -> Needs:
        """No data."""
        return Needs(data=False)

    def embedding(self, weights: Mapping[str, Tensor], frame: Frame) -> dict[str, Tensor]:
        """R1."""
        return rotate_embedding(weights, frame.residual, self._residual(frame))

    def block(self, block: nn.Module, index: int, frame: Frame) -> None:
        """R1, and R2 with signs of the block's own."""
        values = make_rotation(frame.heads.dim, frame.seed + 1 + index, random=self._random)
        rotate_block(block, frame.subsets, frame.heads, self._residual(frame), values)

    def head(self, weights: Mapping[str, Tensor], frame: Frame) -> dict[str, Tensor]:
        """R1 undone."""
        return rotate_head(weights, frame.residual, self._residual(frame))

    def hidden(self, hidden: Tensor, frame: Frame) -> Tensor:
        """R1."""
        return self._residual(frame)(hidden)

    def warnings(self, frame: Frame) -> list[str]:
        """Where no Hadamard matrix can be constructed."""
        if self._random:
            return []
        return [
            f"Quarot: no Hadamard matrix of order {size} ({what}) can be constructed: a random orthogonal one is used"
            for size, what in ((frame.width, "hidden size"), (frame.heads.dim, "head size"))
            if hadamard(size) is None
        ]

    @property
    def _random(self) -> bool:
        return self.options.rotate_mode == "random"

    def _residual(self, frame: Frame) -> Rotation:
        return make_rotation(frame.width, frame.seed, random=self._random, keeps_mean=frame.residual.keeps_mean)
