"""What the model's forward is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples of one length, or one with images.

    Attributes:
        tokens: int64 ``[batch, tokens]``.
        further: of a sample with images, the forward's further inputs by the names of its arguments
            (``pixel_values``, ``image_grid_thw``), as the model's processor made them; empty for text.
    """

    tokens: Tensor
    further: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def has_images(self) -> bool:
        """Whether there is more than text."""
        return bool(self.further)

    @property
    def tensors(self) -> list[Tensor]:
        """All of it, in an order that depends on nothing but the names."""
        return [self.tokens, *(self.further[name] for name in sorted(self.further))]

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and tokens of each."""
        return self.tokens.shape[0], self.tokens.shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The forward's arguments on a device, what isn't integers in the model's dtype."""
        further = {
            name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
            for name, tensor in self.further.items()
        }
        return {"input_ids": self.tokens.to(device), **further}
