"""Work on a matrix some rows at a time.

On a CPU a strip is what a cache holds: what is made of it on the way stays there, where copies of a whole matrix would
each be taken from the system, zeroed page by page, and given back. Other devices take all rows together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_AT_ONCE = 2**17  # elements: in float32 half a megabyte


def strips(matrix: Tensor, together: int = 1) -> Iterator[slice]:
    """The rows of ``[rows, columns]``, strip by strip, ``together`` of them or a multiple of it at a time."""
    rows, columns = matrix.shape
    wanted = _AT_ONCE // max(columns, 1) if matrix.device.type == "cpu" else rows
    step = max(wanted // together, 1) * together
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def squared_norm(matrix: Tensor, other: Tensor | None = None) -> float:
    """The sum of the squares of ``[rows, columns]``, or of its difference from another one. Squares and sums of rows
    are float32, the sum of these is float64."""
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for rows in strips(matrix):
        part = matrix[rows].float()
        part = part.square() if other is None else (part - other[rows].float()).square_()
        total += part.sum(-1).sum(dtype=torch.float64)
    return float(total)
