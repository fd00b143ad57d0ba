"""ShortGPT: blocks that hardly turn the hidden state are dropped (Men et al. 2024, arXiv:2403.03853, section 3)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import Options

NAME = "ShortGPT"


class ShortGPTOptions(Options):
    """ShortGPT has no options beside ``sparse.weight.n_prune_layers``."""


@dataclass
class BlockInfluence:
    """``1 - mean cos(x, y)`` over all tokens, of a block's inputs ``x`` and outputs ``y`` (equation 1)."""

    cosines: float = 0.0
    tokens: int = 0

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add tokens ``[..., hidden]``; a cosine is computed in float32, their sum in float64."""
        found = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        self.cosines += float(found.sum(dtype=torch.float64))
        self.tokens += found.numel()

    @property
    def value(self) -> float:
        """The influence: 0 for a block that changes lengths only, at most 2."""
        return 1 - self.cosines / self.tokens


def least_influential(influences: Sequence[float], count: int, protected: Collection[int] = ()) -> frozenset[int]:
    """The ``count`` blocks of the least influence that aren't protected; of equal ones the first.

    Raises:
        ValueError: there aren't so many.
    """
    free = [index for index in range(len(influences)) if index not in protected]
    if count > len(free):
        raise ValueError(f"{count} of {len(free)} blocks can't be dropped")
    return frozenset(sorted(free, key=lambda index: influences[index])[:count])
