"""GPTQ (Frantar et al., 2022): round column by column, and let the columns not yet rounded make up for the error.

The solve (``columnwise.py``) is one pure function of weights and Gram matrices. Linears that share an input share the
Gram matrix, its factorization and the column loop: they are solved as one stacked matrix. Subsets that are alike, the
experts of a mixture, share the column loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..quant import PerBlock, PerGroup, PerTensor, QuantSpec, QWeight, over_rows, quantize_weight
from .base import Algorithm, Needs, Options
from .columnwise import Problem, Solution, chunks, solve_all
from .columnwise import solve as solve
from .rtn import clipped_qparams, round_subset
from .stats import relative_error, rounding_error
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
        self.solve([view])

    def solve(self, views: Sequence[SubsetView]) -> None:
        """The same for several subsets: what is alike in shape and grid goes through one column loop."""
        alike: dict[tuple[object, ...], list[_Job]] = {}
        for view in views:
            if view.stats.gram is None:
                raise ValueError("GPTQ needs the Gram matrix of its inputs")
            if view.stats.gram.tokens == 0:
                round_subset(view, "no calibration token reaches it: rounded to nearest")
                continue
            for position, job in enumerate(self._jobs(view)):
                alike.setdefault((position, *job.kind), []).append(job)
        for jobs in alike.values():
            for chunk in chunks(jobs, jobs[0].elements, jobs[0].device):
                self._solve(chunk)

    def _jobs(self, view: SubsetView) -> list[_Job]:
        grids: dict[QuantSpec, list[str]] = {}
        for name, spec in view.specs.items():
            grids.setdefault(spec, []).append(name)
        found = []
        for spec, names in grids.items():
            alone = isinstance(spec.granularity, PerTensor | PerBlock)
            for together in [[name] for name in names] if alone else [names]:
                static = self._static(spec, view.columns) or any(name in view.clips for name in together)
                found.append(_Job(view, spec, together, static))
        return found

    def _solve(self, jobs: Sequence[_Job]) -> None:
        ranges = [job.ranges() for job in jobs]
        problems = [job.problem(found) for job, found in zip(jobs, ranges, strict=True)]
        solutions = solve_all(problems, jobs[0].spec, self.options)
        for job, found, solution in zip(jobs, ranges, solutions, strict=True):
            job.deliver(found, solution)

    def _static(self, spec: QuantSpec, columns: int) -> bool:
        """Whether ranges are those of the original weights. With a single group they are in any case."""
        if isinstance(spec.granularity, PerTensor | PerBlock) or spec.group_size(columns) == columns:
            return True
        wanted = self.options.static_groups
        return self.options.actorder is True if wanted is None else wanted


@dataclass(frozen=True)
class _Job:
    """Linears of a view that share a grid: they are solved as one stacked matrix.

    Attributes:
        view: where they are, and where the results go.
        spec: the grid.
        names: the Linears.
        static: whether their ranges are found beforehand.
    """

    view: SubsetView
    spec: QuantSpec
    names: list[str]
    static: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """What jobs must have in common to be solved together. A scale that all scales are multiplied by only matters
        to those that are found on the way."""
        spec = replace(self.spec, global_scale=None, shared_range=None) if self.static else self.spec
        shapes = tuple(self.view.linears[name].weight.shape for name in self.names)
        return spec, shapes, self.static, self._is_pruned

    @property
    def device(self) -> torch.device:
        """Where it's solved."""
        return self._gram.device

    @property
    def elements(self) -> int:
        """Of its largest tensors: the stacked weight and the Gram matrix."""
        columns = self.view.columns
        return columns * (columns + sum(len(self.view.linears[name].weight) for name in self.names))

    @property
    def _is_pruned(self) -> bool:
        return self.view.pruned.keys() >= {*self.names}

    @property
    def _gram(self) -> Tensor:
        if self.view.stats.gram is None:
            raise ValueError("GPTQ needs the Gram matrix of its inputs")
        return self.view.stats.gram.matrix

    def _weight(self, name: str) -> Tensor:
        """``[out, in]`` in float32, 0 where the input channel is always 0."""
        return self.view.weight(name).masked_fill(self._gram.diagonal() == 0, 0)

    def ranges(self) -> list[tuple[Tensor, Tensor]]:
        """Scale and zero point of each original weight, clipped where an earlier step asks for it."""
        return [clipped_qparams(self._weight(name), self.spec, self.view.clips.get(name)) for name in self.names]

    def problem(self, ranges: list[tuple[Tensor, Tensor]]) -> Problem:
        """What is to be solved."""
        weights, fixed = [self._weight(name) for name in self.names], None
        if self.static:
            by_row = [
                [over_rows(part, weight.shape, self.spec) for part in found]
                for weight, found in zip(weights, ranges, strict=True)
            ]
            fixed = (torch.cat([scale for scale, _ in by_row]), torch.cat([zero for _, zero in by_row]))
        pruned = torch.cat([self.view.pruned[name] for name in self.names]) if self._is_pruned else None
        return Problem(torch.cat(weights), self._gram, fixed, None if pruned is None else pruned.to(self.device))

    def deliver(self, ranges: list[tuple[Tensor, Tensor]], solution: Solution | None) -> None:
        """Hand over the result; weights rounded to nearest if there is none."""
        first = 0
        for name, found in zip(self.names, ranges, strict=True):
            weight = self._weight(name)
            if solution is None:
                quantized = quantize_weight(weight, self.spec, found)
                why = "the Hessian could not be factored at any damping: rounded to nearest"
                note = LayerNote(rounding_error(weight, quantized), fallback=why)
            else:
                rows = slice(first, first + len(weight))
                shared = isinstance(self.spec.granularity, PerTensor | PerBlock)
                scale, zero = found if shared else (solution.scale[rows], solution.zero[rows])
                quantized = QWeight.from_float(solution.codes[rows], scale, zero, self.spec, solution.group_index)
                note = LayerNote(relative_error(weight, quantized.dequantize(), self._gram), damp=solution.damp)
            first += len(weight)
            self.view.put(name, quantized, note)
