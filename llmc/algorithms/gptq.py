"""GPTQ (Frantar et al., 2022): round column by column, and let the columns not yet rounded make up for the error.

The solve is one pure function of a weight and a Gram matrix. Linears that share an input share the Gram matrix, its
factorization and the column loop: they are solved as one stacked matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..linalg import input_factor, replace_columns
from ..quant import PerBlock, PerGroup, PerTensor, QuantSpec, QWeight, over_rows, quantize_weight
from ..quant.affine import find_ranges, qparams, quantize
from .base import Algorithm, Needs, Options
from .rtn import clipped_qparams, round_subset
from .stats import relative_error
from .views import LayerNote, SubsetView


class GPTQOptions(Options):
    """Options of GPTQ, by LLMC's names."""

    actorder: bool | Literal["group_aware"] = Field(
        default=True,
        description="Column order: true visits columns by falling Hessian diagonal; group_aware does so within groups "
        "and orders whole groups, so that ranges can follow the updated weights and no index is exported.",
    )
    static_groups: bool | None = Field(
        default=None,
        description="Find all group ranges on the original weights; by default only where actorder: true needs it.",
    )
    percdamp: float = Field(default=0.01, ge=0, lt=1, description="Damping, as a share of the Hessian's mean diagonal.")
    blocksize: int = Field(default=128, ge=1, description="Columns between two updates of the remaining weights.")
    true_sequential: bool = Field(
        default=True, description="A subset's Hessian comes from inputs that the block's compressed subsets produced."
    )
    chunk_num: int = Field(default=1, ge=1, description="Accepted for compatibility; without effect.")
    owq: Literal[False] = Field(default=False, description="Outlier columns in full precision; not available.")
    n_outs: Any = Field(default=None, description="Only with owq; ignored.")


@dataclass(frozen=True)
class Solution:
    """Codes (``[out, in]``, int8 or the values of a float grid), scales and zero points (float32
    ``[out, groups]``), and the damping that it took."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_index: Tensor | None
    damp: float


class GPTQ(Algorithm):
    """Weight quantizer by second-order error compensation."""

    name = "GPTQ"
    kind = "quantizer"
    options_type: ClassVar[type[Options]] = GPTQOptions
    statistics = frozenset({"gram"})

    def __init__(self, options: GPTQOptions) -> None:
        self.options = options

    def needs(self, *, quant_out: bool | None) -> Needs:
        """As published, the compressed model's activations calibrate it."""
        compressed = True if quant_out is None else quant_out
        return Needs(data=True, sequential=self.options.true_sequential, compressed_stream=compressed)

    def scatters_groups(self, spec: QuantSpec) -> bool:
        """Act-order over ranges that are found on the way does."""
        grouped = isinstance(spec.granularity, PerGroup)
        return grouped and self.options.actorder is True and self.options.static_groups is False

    def subset(self, view: SubsetView) -> None:
        """Solve the Linears of each grid together; fall back to rounding where no damping makes the Hessian regular."""
        gram = view.stats.gram
        if gram is None:
            raise ValueError("GPTQ needs the Gram matrix of its inputs")
        if gram.tokens == 0:
            round_subset(view, "no calibration token reaches it: rounded to nearest")
            return
        grids: dict[QuantSpec, list[str]] = {}
        for name, spec in view.specs.items():
            grids.setdefault(spec, []).append(name)
        for spec, names in grids.items():
            if isinstance(spec.granularity, PerTensor | PerBlock):
                for name in names:
                    self._solve(view, spec, [name], gram.matrix)
            else:
                self._solve(view, spec, names, gram.matrix)

    def _solve(self, view: SubsetView, spec: QuantSpec, names: list[str], gram: Tensor) -> None:
        dead = gram.diagonal() == 0
        weights = [view.linears[name].weight.detach().float().masked_fill(dead, 0) for name in names]
        ranges = [
            clipped_qparams(weight, spec, view.clips.get(name)) for name, weight in zip(names, weights, strict=True)
        ]
        static = self._static(spec, view.columns) or any(name in view.clips for name in names)
        fixed = None
        if static:
            by_row = [
                [over_rows(part, weight.shape, spec) for part in found]
                for weight, found in zip(weights, ranges, strict=True)
            ]
            fixed = (torch.cat([scale for scale, _ in by_row]), torch.cat([zero for _, zero in by_row]))
        pruned = torch.cat([view.pruned[name] for name in names]) if view.pruned.keys() >= {*names} else None
        solution = solve(torch.cat(weights), gram, spec, self.options, fixed, pruned)
        rows = [len(weight) for weight in weights]
        for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
            if solution is None:
                quantized = quantize_weight(weight, spec, ranges[index])
                why = "the Hessian could not be factored at any damping: rounded to nearest"
                note = LayerNote(relative_error(weight, quantized.dequantize(), None), fallback=why)
            else:
                part = slice(sum(rows[:index]), sum(rows[: index + 1]))
                shared = isinstance(spec.granularity, PerTensor | PerBlock)
                scale, zero = ranges[index] if shared else (solution.scale[part], solution.zero[part])
                quantized = QWeight.from_float(solution.codes[part], scale, zero, spec, solution.group_index)
                note = LayerNote(relative_error(weight, quantized.dequantize(), gram), damp=solution.damp)
            view.put(name, quantized, note)

    def _static(self, spec: QuantSpec, columns: int) -> bool:
        """Whether ranges are those of the original weights. With a single group they are in any case."""
        if isinstance(spec.granularity, PerTensor | PerBlock) or spec.group_size(columns) == columns:
            return True
        wanted = self.options.static_groups
        return self.options.actorder is True if wanted is None else wanted


@dataclass
class _Rounding:
    """What GPTQ makes of a column: the nearest points of its groups' grids.

    Attributes:
        work: the updated weight in the visiting order, ``[in, out]``.
        spec: the grid.
        codes: found so far, ``[in, out]``.
        scales, zeros: ``[groups, out]``; where ``search`` is set, found when the loop reaches the group.
        group_of: the group of each column.
        search: columns of a group whose range is to be found; 0 where all ranges are there.
        pruned: ``[in, out]``, weights that stay 0; None if there are none.
    """

    work: Tensor
    spec: QuantSpec
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: list[int]
    search: int
    pruned: Tensor | None

    def begin(self, start: int, stop: int) -> None:
        """Find the range of a group that starts here, all updates included."""
        if not self.search or start % self.search:
            return
        part = slice(start, start + self.search)
        values = self.work[part] if self.pruned is None else self.work[part].masked_fill(self.pruned[part], 0)
        found = qparams(*find_ranges(values.T, self.spec), self.spec)
        group = start // self.search
        self.scales[group], self.zeros[group] = (part.squeeze(-1) for part in found)

    def replace(self, column: int) -> Tensor:
        """Round to nearest; the zero point's code where the weight is pruned."""
        scale, zero = self.scales[self.group_of[column]], self.zeros[self.group_of[column]]
        code = quantize(self.work[column], scale, zero, self.spec)
        if self.pruned is not None:
            code = torch.where(self.pruned[column], zero, code)
        self.codes[column] = code
        return code.sub_(zero).mul_(scale)


def solve(
    weight: Tensor,
    gram: Tensor,
    spec: QuantSpec,
    options: GPTQOptions,
    fixed: tuple[Tensor, Tensor] | None,
    pruned: Tensor | None = None,
    groups: Tensor | None = None,
) -> Solution | None:
    """Quantize ``weight`` ``[out, in]`` (float32) against the Gram matrix ``[in, in]`` of its inputs.

    Args:
        weight: float32.
        gram: float32, symmetric.
        spec: the grid.
        options: order, damping, block size.
        fixed: scale and zero point ``[out, groups]`` decided beforehand (static groups); None: each group's range is
            taken from the weights as they are, *all* updates included, when the loop reaches the group.
        pruned: ``[out, in]``, weights that are and stay 0: what the updates bring them goes on to the columns behind.
        groups: ``[in]`` int64, with ``fixed``: the group of each column where groups aren't runs of consecutive
            columns. They are then visited one after the other, each in the order of its columns.

    Returns:
        The solution in the original column order, or None if the Hessian can't be factored.
    """
    columns = weight.shape[1]
    size = columns if isinstance(spec.granularity, PerTensor) else spec.group_size(columns)
    # 1. Damp and factor in the visiting order.
    order = _column_order(gram.diagonal(), options, size) if groups is None else groups.argsort(stable=True)
    factor = input_factor(gram, options.percdamp, order)
    if factor is None:
        return None
    # 2. Columns become rows: what the loop touches is contiguous.
    work = weight.T[order].contiguous()
    codes = torch.empty_like(work, dtype=torch.int8 if spec.grid == "int" else torch.float32)
    rows = len(weight)
    del weight  # the caller's last reference, where it stacked several
    if fixed is None:
        # A group's range may wait for no update: let every group start where a block starts.
        block = math.gcd(size, options.blocksize)
        group_of = (torch.arange(columns) // size).tolist()
        scales, zeros = (work.new_empty(columns // size, rows) for _ in range(2))
    else:
        block = options.blocksize
        group_of = (order // size if groups is None else groups[order]).tolist()
        scales, zeros = (part.T.contiguous() for part in fixed)
    # 3. Round a column, spread its error over the columns behind it.
    held = None if pruned is None else pruned.T[order].contiguous()
    rule = _Rounding(work, spec, codes, scales, zeros, group_of, 0 if fixed is not None else size, held)
    replace_columns(work, factor.upper, rule, block=block)
    del work, rule
    return _in_original_order(codes, scales, zeros, order, size, options, fixed, factor.damp)


def _column_order(diagonal: Tensor, options: GPTQOptions, size: int) -> Tensor:
    """The order in which columns are visited, ``[in]``."""
    if options.actorder is False:
        return torch.arange(len(diagonal), device=diagonal.device)
    # A block at the edge may be smaller; its ranges are fixed, so that groups needn't stay together.
    if options.actorder is True or len(diagonal) % size:
        return diagonal.argsort(descending=True, stable=True)
    by_group = diagonal.reshape(-1, size)
    inside = by_group.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(len(by_group), device=diagonal.device)[:, None] * size
    return (inside + first)[by_group.sum(1).argsort(descending=True, stable=True)].reshape(-1)


def _in_original_order(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    order: Tensor,
    size: int,
    options: GPTQOptions,
    fixed: tuple[Tensor, Tensor] | None,
    damp: float,
) -> Solution:
    """Undo the visiting order. Groups aren't runs of columns only after act-order over ranges found on the way."""
    restored = torch.empty_like(codes)
    restored[order] = codes
    if fixed is not None:
        return Solution(restored.T, *fixed, None, damp)
    if options.actorder is True:
        index = torch.empty_like(order)
        index[order] = torch.arange(len(order), device=order.device) // size
        return Solution(restored.T, scales.T, zeros.T, index.int(), damp)
    by_group = order[::size] // size
    scale, zero = torch.empty_like(scales), torch.empty_like(zeros)
    scale[by_group], zero[by_group] = scales, zeros
    return Solution(restored.T, scale.T, zero.T, None, damp)
