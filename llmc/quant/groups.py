"""A matrix as groups of values that share a scale, and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from .spec import PerBlock, PerTensor, QuantSpec
from .strips import strips


def to_groups(weight: Tensor, spec: QuantSpec) -> Tensor:
    """View ``[out, in]`` as ``[out, groups, group]`` (per tensor: ``[1, 1, out * in]``).

    Square blocks become ``[blocks down, blocks across, size * size]``, a copy; what is missing at the edges is 0, which
    changes no range.

    Raises:
        ValueError: the group size doesn't divide the number of input channels.
    """
    if isinstance(spec.granularity, PerTensor):
        return weight.reshape(1, 1, -1)
    if isinstance(spec.granularity, PerBlock):
        size, (rows, columns) = spec.granularity.size, weight.shape
        padded = pad(weight, (0, -columns % size, 0, -rows % size))
        down, across = padded.shape[0] // size, padded.shape[1] // size
        return padded.reshape(down, size, across, size).transpose(1, 2).reshape(down, across, size * size)
    size = spec.group_size(weight.shape[1])
    if weight.shape[1] % size:
        raise ValueError(f"group size {size} doesn't divide {weight.shape[1]} input channels")
    return weight.reshape(weight.shape[0], -1, size)


def from_groups(groups: Tensor, shape: torch.Size, spec: QuantSpec) -> Tensor:
    """The inverse of ``to_groups``: a matrix of ``shape`` ``[out, in]``."""
    if not isinstance(spec.granularity, PerBlock):
        return groups.reshape(shape)
    size, (down, across, _) = spec.granularity.size, groups.shape
    padded = groups.reshape(down, across, size, size).transpose(1, 2).reshape(down * size, across * size)
    return padded[: shape[0], : shape[1]].contiguous()


def group_strips(matrix: Tensor, spec: QuantSpec) -> Iterator[tuple[slice, slice]]:
    """Some rows of ``[out, in]`` at a time, and which rows of the scales are theirs; square blocks stay whole."""
    granularity = spec.granularity
    size = granularity.size if isinstance(granularity, PerBlock) else 1
    for rows in strips(matrix, size):
        whole = isinstance(granularity, PerTensor)
        yield rows, slice(None) if whole else slice(rows.start // size, -(-rows.stop // size))


def over_rows(qparam: Tensor, shape: torch.Size, spec: QuantSpec) -> Tensor:
    """Scales or zero points as one for each row and group, ``[out, groups]``, where blocks share them among rows."""
    if not isinstance(spec.granularity, PerBlock):
        return qparam
    return qparam.repeat_interleave(spec.granularity.size, dim=0)[: shape[0]]
