"""A tensor from above: how large it is, token by token and channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor

CELLS = (64, 128)
"""At most so many cells of tokens, and of channels."""


def surface(tokens: Tensor) -> Tensor:
    """The largest magnitude in each cell of ``[tokens, channels]``, float32 ``[token cells, channel cells]``.

    Cell ``i`` of ``c`` has the indices from ``floor(i n / c)`` up to, not with, ``floor((i + 1) n / c)``.
    """
    rows = torch.stack([tokens[start:stop].abs().amax(0) for start, stop in _bounds(tokens.shape[0], CELLS[0])])
    cells = [rows[:, start:stop].amax(1) for start, stop in _bounds(tokens.shape[1], CELLS[1])]
    return torch.stack(cells, dim=1).float().cpu()


def _bounds(count: int, cells: int) -> list[tuple[int, int]]:
    cells = min(count, cells)
    return [(index * count // cells, (index + 1) * count // cells) for index in range(cells)]
