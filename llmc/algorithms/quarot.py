"""QuaRot (Ashkboos et al., 2024): rotate the residual and the value heads, so that no channel stands out.

R1 (residual) and R2 (values) are merged into the weights, so that the result is an ordinary checkpoint of the same
architecture. If asked, R4 (input of the last feed-forward Linear; section 4, stage 1b) and R3 (queries and keys; stage
1d) run with the model: R4's inverse is merged, R3 needs none, since only products of queries and keys count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from ..errors import ConfigError
from ..linalg import OnlineRotation, Rotation, hadamard, make_rotation
from ..models import rotate_block, rotate_embedding, rotate_head
from .base import Algorithm, Frame, Needs, Online, Options


class QuarotOptions(Options):
    """Options of QuaRot, by LLMC's names."""

    rotate_mode: Literal["hadamard", "random"] = Field(
        default="hadamard", description="hadamard: with random signs; random: any orthogonal matrix, usually worse."
    )
    online_rotate: bool = Field(
        default=False,
        description="While the model runs also rotate the input of the last feed-forward Linear (R4) and, where the KV "
        "cache is quantized, queries and keys (R3). What is merged into the weights is always done.",
    )
    fp32_had: bool = Field(
        default=True, description="Compute the online rotations in float32 where the model computes in 16 bits."
    )
    online_blocks: bool = Field(
        default=False,
        description="Rotate the input of the last feed-forward Linear in blocks of the largest power of two that "
        "divides it, as vLLM can, rather than as a whole.",
    )

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.online_blocks and not self.online_rotate:
            raise ValueError("online_blocks has no use without online_rotate: True; remove it, or add that")
        return self


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
        rotate_block(block, frame.subsets[index], frame.heads, self._residual(frame), values, self.online(frame).ffn)

    def head(self, weights: Mapping[str, Tensor], frame: Frame) -> dict[str, Tensor]:
        """R1 undone."""
        return rotate_head(weights, frame.residual, self._residual(frame))

    def hidden(self, hidden: Tensor, frame: Frame) -> Tensor:
        """R1."""
        return self._residual(frame)(hidden)

    def online(self, frame: Frame) -> Online:
        """R4 and R3.

        Raises:
            ConfigError: no Hadamard matrix of a size can be constructed.
        """
        if not self.options.online_rotate:
            return Online()
        size = frame.ffn & -frame.ffn if self.options.online_blocks else frame.ffn  # its lowest bit, or all of it
        ffn = self._online(size, "channels between the feed-forward's Linears")
        return Online(ffn, self._online(frame.heads.dim, "channels of a head"))

    def warnings(self, frame: Frame) -> list[str]:
        """Where no Hadamard matrix can be constructed."""
        if self._random:
            return []
        return [
            f"Quarot: no Hadamard matrix of order {size} ({what}) can be constructed: a random orthogonal one is used"
            for size, what in ((frame.width, "hidden size"), (frame.heads.dim, "head size"))
            if hadamard(size) is None
        ]

    def _online(self, size: int, what: str) -> OnlineRotation:
        basis = hadamard(size) if size else None
        if basis is None:
            raise ConfigError(
                f"quant.special: online_rotate: True needs a Hadamard matrix of order {size or 'that blocks share'} "
                f"({what}), and none can be constructed",
                "set online_rotate: False; the offline rotations need none",
            )
        return OnlineRotation(basis, self.options.fp32_had)

    @property
    def _random(self) -> bool:
        return self.options.rotate_mode == "random"

    def _residual(self, frame: Frame) -> Rotation:
        return make_rotation(frame.width, frame.seed, random=self._random, keeps_mean=frame.residual.keeps_mean)
