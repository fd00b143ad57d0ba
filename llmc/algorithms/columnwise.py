"""GPTQ's solve: pure functions of weights and the Gram matrices of their inputs.

Problems of one shape and grid go through one column loop, each with its own order, factor and ranges. On a CPU each
comes out bit for bit as it would alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ..linalg import input_factors, replace_columns
from ..quant import PerTensor, QuantSpec
from ..quant.affine import find_ranges, qparams, quantize

_T = TypeVar("_T")
# How many elements of weights and Gram matrices are solved together. A CPU gains nothing beyond what its caches hold a
# tile of; elsewhere a step costs the same for almost any number of columns.
_CPU, _ELSEWHERE = 2**22, 2**27


class Settings(Protocol):
    """What the solve reads of GPTQ's options."""

    @property
    def actorder(self) -> bool | Literal["group_aware"]:
        """The order in which columns are visited."""
        ...

    @property
    def percdamp(self) -> float:
        """Damping, as a share of the Hessian's mean diagonal."""
        ...

    @property
    def blocksize(self) -> int:
        """Columns between two updates of the remaining weights."""
        ...


@dataclass(frozen=True)
class Problem:
    """A matrix that is to be rounded.

    Attributes:
        weight: ``[out, in]`` float32.
        gram: ``[in, in]`` float32, symmetric: of its inputs.
        fixed: scale and zero point ``[out, groups]`` decided beforehand (static groups); None: each group's range is
            taken from the weights as they are, *all* updates included, when the loop reaches the group.
        pruned: ``[out, in]``, weights that are and stay 0: what the updates bring them goes on to the columns behind.
        groups: ``[in]`` int64, with ``fixed``: the group of each column where groups aren't runs of consecutive
            columns. They are then visited one after the other, each in the order of its columns.
    """

    weight: Tensor
    gram: Tensor
    fixed: tuple[Tensor, Tensor] | None = None
    pruned: Tensor | None = None
    groups: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """Codes (``[out, in]``, int8 or the values of a float grid), scales and zero points (float32
    ``[out, groups]``), and the damping that it took."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_index: Tensor | None
    damp: float


def chunks(items: Sequence[_T], elements: int, device: torch.device) -> Iterator[Sequence[_T]]:
    """So many of ``items`` at a time, of ``elements`` each, as are worth solving together."""
    size = max(1, (_CPU if device.type == "cpu" else _ELSEWHERE) // elements)
    for start in range(0, len(items), size):
        yield items[start : start + size]


def solve(
    weight: Tensor,
    gram: Tensor,
    spec: QuantSpec,
    options: Settings,
    fixed: tuple[Tensor, Tensor] | None,
    pruned: Tensor | None = None,
    groups: Tensor | None = None,
) -> Solution | None:
    """``solve_all`` of one problem, which see."""
    problems = [Problem(weight, gram, fixed, pruned, groups)]
    del weight  # the caller's last reference, where it stacked several
    return solve_all(problems, spec, options)[0]


def solve_all(problems: list[Problem], spec: QuantSpec, options: Settings) -> list[Solution | None]:
    """Quantize weights of one shape, each against its own Gram matrix.

    Args:
        problems: alike in shape, and in what they have of ``fixed`` and ``pruned``. The list is emptied: the weights
            needn't live twice.
        spec: the grid.
        options: order, damping, block size.

    Returns:
        The solutions in the original column order; None where the Hessian can't be factored.
    """
    columns = problems[0].weight.shape[1]
    size = columns if isinstance(spec.granularity, PerTensor) else spec.group_size(columns)
    # 1. Damp and factor in the visiting order.
    orders = [_visiting_order(problem, options, size) for problem in problems]
    factors = input_factors([problem.gram for problem in problems], options.percdamp, orders)
    found = factors.found
    if not found:
        return [None] * len(factors.damps)
    orders, chosen = [orders[index] for index in found], [problems[index] for index in found]
    problems.clear()
    # 2. Columns become rows: what the loop touches is contiguous.
    work = _by_columns([problem.weight for problem in chosen], orders)
    masks = [problem.pruned for problem in chosen if problem.pruned is not None]
    held = _by_columns(masks, orders) if masks else None
    fixed = [problem.fixed for problem in chosen if problem.fixed is not None]
    groups = [problem.groups for problem in chosen]
    del chosen, masks
    codes = torch.empty_like(work, dtype=torch.int8 if spec.grid == "int" else torch.float32)
    ranges = _Ranges.of(work, spec, size, orders, fixed, groups)
    # A group's range may wait for no update: let every group start where a block starts.
    block = options.blocksize if fixed else math.gcd(size, options.blocksize)
    # 3. Round a column, spread its error over the columns behind it.
    rule = _Rounding(work, spec, codes, ranges, 0 if fixed else size, held)
    replace_columns(work, factors.upper, rule, block=block)
    del work, rule, held
    solutions: list[Solution | None] = [None] * len(factors.damps)
    for place, index in enumerate(found):
        parts = codes[:, place], ranges.scales[:, place], ranges.zeros[:, place]
        own = fixed[place] if fixed else None
        solutions[index] = _in_original_order(*parts, orders[place], size, options, own, factors.damps[index] or 0.0)
    return solutions


def _visiting_order(problem: Problem, options: Settings, size: int) -> Tensor:
    """The order in which columns are visited, ``[in]``."""
    if problem.groups is not None:
        return problem.groups.argsort(stable=True)
    diagonal = problem.gram.diagonal()
    if options.actorder is False:
        return torch.arange(len(diagonal), device=diagonal.device)
    # A block at the edge may be smaller; its ranges are fixed, so that groups needn't stay together.
    if options.actorder is True or len(diagonal) % size:
        return diagonal.argsort(descending=True, stable=True)
    by_group = diagonal.reshape(-1, size)
    inside = by_group.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(len(by_group), device=diagonal.device)[:, None] * size
    return (inside + first)[by_group.sum(1).argsort(descending=True, stable=True)].reshape(-1)


def _by_columns(matrices: Sequence[Tensor], orders: Sequence[Tensor]) -> Tensor:
    """``[out, in]`` each as one ``[in, matrices, out]``, with the columns of each in its order."""
    rows, columns = matrices[0].shape
    found = matrices[0].new_empty(columns, len(matrices), rows)
    for index, (matrix, order) in enumerate(zip(matrices, orders, strict=True)):
        found[:, index] = matrix.T[order]
    return found


class _Ranges:
    """Scale and zero point of each column that is visited.

    Args:
        scales: ``[groups, matrices, out]`` (per tensor: ``[1, matrices, 1]``); may be filled later.
        zeros: likewise.
        groups: for each matrix the group of each column, ``[in]``, in the visiting order.
        spec: the grid.
    """

    def __init__(self, scales: Tensor, zeros: Tensor, groups: Sequence[Tensor], spec: QuantSpec) -> None:
        self.scales, self.zeros = scales, zeros
        self._symmetric = spec.symmetric
        self._shared = groups[0].tolist()
        self._rows: tuple[Tensor, ...] = ()
        if any(not torch.equal(one, groups[0]) for one in groups[1:]):
            places = torch.arange(len(groups), device=scales.device)
            self._rows = (torch.stack(list(groups), dim=1) * len(groups) + places).unbind()

    @classmethod
    def of(
        cls,
        work: Tensor,
        spec: QuantSpec,
        size: int,
        orders: Sequence[Tensor],
        fixed: Sequence[tuple[Tensor, Tensor]],
        groups: Sequence[Tensor | None],
    ) -> _Ranges:
        """Those that are ``fixed``, or room for those that will be found. Groups have ``size`` columns, or are told."""
        columns = len(work)
        if fixed:
            scales, zeros = (torch.stack([part.T for part in parts], dim=1) for parts in zip(*fixed, strict=True))
            visited = [order // size if own is None else own[order] for order, own in zip(orders, groups, strict=True)]
            return cls(scales, zeros, visited, spec)
        scales, zeros = (work.new_empty(columns // size, *work.shape[1:]) for _ in range(2))
        return cls(scales, zeros, [torch.arange(columns) // size] * len(orders), spec)

    def at(self, column: int) -> tuple[Tensor, Tensor]:
        """Those of a column, ``[matrices, out]``."""
        if not self._rows:
            group = self._shared[column]
            return self.scales[group], self.zeros[group]
        rows = self._rows[column]
        scale = self.scales.flatten(0, 1).index_select(0, rows)
        return scale, self.zeros[0] if self._symmetric else self.zeros.flatten(0, 1).index_select(0, rows)


@dataclass
class _Rounding:
    """What GPTQ makes of a column: the nearest points of its groups' grids.

    Attributes:
        work: the updated weights in the visiting order, ``[in, matrices, out]``.
        spec: the grid.
        codes: found so far, ``[in, matrices, out]``.
        ranges: of all groups; where ``search`` is set, found when the loop reaches the group.
        search: columns of a group whose range is to be found; 0 where all ranges are there.
        pruned: ``[in, matrices, out]``, weights that stay 0; None if there are none.
    """

    work: Tensor
    spec: QuantSpec
    codes: Tensor
    ranges: _Ranges
    search: int
    pruned: Tensor | None

    def begin(self, start: int, stop: int) -> None:
        """Find the range of a group that starts here, all updates included."""
        if not self.search or start % self.search:
            return
        part = slice(start, start + self.search)
        values = self.work[part] if self.pruned is None else self.work[part].masked_fill(self.pruned[part], 0)
        group = start // self.search
        for index in range(values.shape[1]):  # one by one: a sum's rounding depends on what stands beside it
            found = qparams(*find_ranges(values[:, index].T, self.spec), self.spec)
            self.ranges.scales[group, index], self.ranges.zeros[group, index] = (one.squeeze(-1) for one in found)

    def replace(self, column: int) -> Tensor:
        """Round to nearest; the zero point's code where the weight is pruned."""
        scale, zero = self.ranges.at(column)
        code = quantize(self.work[column], scale, zero, self.spec)
        if self.pruned is not None:
            code = torch.where(self.pruned[column], zero, code)
        self.codes[column] = code
        return code.sub_(zero).mul_(scale)


def _in_original_order(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    order: Tensor,
    size: int,
    options: Settings,
    fixed: tuple[Tensor, Tensor] | None,
    damp: float,
) -> Solution:
    """Undo the visiting order. Groups aren't runs of columns only after act-order over ranges found on the way."""
    restored = torch.empty(codes.shape, dtype=codes.dtype, device=codes.device)
    restored[order] = codes
    if fixed is not None:
        return Solution(restored.T, *fixed, None, damp)
    if options.actorder is True:
        index = torch.empty_like(order)
        index[order] = torch.arange(len(order), device=order.device) // size
        return Solution(restored.T, scales.T.contiguous(), zeros.T.contiguous(), index.int(), damp)
    by_group = order[::size] // size
    scale, zero = torch.empty_like(scales), torch.empty_like(zeros)
    scale[by_group], zero[by_group] = scales, zeros
    return Solution(restored.T, scale.T, zero.T, None, damp)
