"""What the recipe does to one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..algorithms import ClipRatios, LayerNote, Recipe, Statistics, Step, SubsetView, new_statistics
from ..models import Heads, Subset, fold_scale, fold_shift
from ..quant import QWeight, UnitRecord
from .memory import trim_heap
from .stages import BlockRun, HeldCalls, Stage, run_replayed, run_staged, run_together


@dataclass(frozen=True)
class WorkContext:
    """What is the same for all blocks."""

    recipe: Recipe
    subsets: tuple[Subset, ...]
    heads: Heads
    device: torch.device
    forward: Literal["auto", "staged", "replay"]


@dataclass
class BlockWork:
    """Carries a loaded block through the recipe.

    Attributes:
        context: what is the same for all blocks.
        index: the block's number.
        block: the module, with its original weights.
        prefix: its name in the model.
        stored: for each of its parameters, by the model's name, the checkpoint's name and dtype.
        quantized: results by name in the block.
        notes: what the report says, by name in the block.
        scales: largest and smallest folded input scale of each subset.
    """

    context: WorkContext
    index: int
    block: nn.Module
    prefix: str
    stored: Mapping[str, tuple[str, torch.dtype]]
    quantized: dict[str, QWeight] = field(default_factory=dict)
    notes: dict[str, LayerNote] = field(default_factory=dict)
    clips: dict[str, ClipRatios] = field(default_factory=dict)
    scales: dict[str, list[float]] = field(default_factory=dict)
    _pending: list[Tensor] | None = None

    def transform(self, original: BlockRun | None, compressed: BlockRun | None) -> None:
        """Run the transforms. Brings the original calibration stream behind the block.

        A transform folds only when it has seen all subsets, so its forward is that of the unchanged block, and its
        outputs are the original stream's next inputs for nothing. Where several steps read that stream, or one changes
        weights on the way, the outputs are computed beforehand and take the inputs' place when all have read them.
        """
        readers = [s for s in self._data_steps() if not s.needs.compressed_stream]
        single = len(readers) == 1 and not readers[0].needs.sequential
        first = single and readers[0] is self.context.recipe.steps[0]
        pending = None
        if original is not None and not first:
            pending = [original.forward(batch).cpu() for batch in range(len(original.inputs))]
        for step in self.context.recipe.steps:
            if step.algorithm.kind == "transform":
                run = compressed if step.needs.compressed_stream else original
                self._phase(step, run, keep=run is original and first)
        self._pending = pending
        self._store_plain()

    def quantize(self, original: BlockRun | None, compressed: BlockRun | None) -> bool:
        """Run the quantizer. Returns whether the compressed stream already is behind the block."""
        if not self.context.recipe.steps:
            return False
        step = self.context.recipe.steps[-1]
        if step.algorithm.kind == "transform":
            raise ValueError("a recipe ends with a quantizer")
        run = compressed if step.needs.compressed_stream else original
        free = step.needs.data and step.needs.sequential and step.needs.compressed_stream
        keep = free if run is compressed else self._pending is None and original is not None
        self._phase(step, run if step.needs.data else None, keep=keep)
        if original is not None and self._pending is not None:
            for batch, output in enumerate(self._pending):
                original.inputs.store(batch, output)
        return free

    def _data_steps(self) -> list[Step]:
        return [step for step in self.context.recipe.steps if step.needs.data]

    # --- one step ----------------------------------------------------------------------------------------------------

    def _phase(self, step: Step, run: BlockRun | None, *, keep: bool) -> None:
        views: list[SubsetView] = []

        def solve(position: int, statistics: Statistics, calls: HeldCalls | None) -> None:
            view = self._view(self.context.subsets[position], statistics, calls)
            step.algorithm.subset(view)
            self._accept(view)
            view.stats, view.calls = Statistics(), None  # the Gram matrices of a block needn't live side by side
            views.append(view)
            trim_heap()

        if run is None:
            for position in range(len(self.context.subsets)):
                solve(position, Statistics(), None)
        else:
            searching = step.algorithm.kind == "transform"
            stages = [self._stage(subset, step, searching=searching) for subset in self.context.subsets]
            self._runner(step, searching)(run, stages, solve, keep=keep)
        for view in views:
            self._fold(view)

    def _runner(self, step: Step, searching: bool) -> Callable[..., None]:
        if not step.needs.sequential and not searching:
            return run_together
        return run_replayed if self.context.forward == "replay" else run_staged

    def _stage(self, subset: Subset, step: Step, *, searching: bool) -> Stage:
        linears = tuple(self._linear(name) for name in subset.linears)
        inspect = (self.block.get_submodule(subset.inspect) if subset.inspect else self.block) if searching else None
        columns = linears[0].weight.shape[1]
        return Stage(linears, inspect, partial(new_statistics, step.algorithm.statistics, columns, self.context.device))

    def _linear(self, name: str) -> nn.Linear:
        module = self.block.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{self.prefix}.{name} is a {type(module).__name__}, not a Linear")
        return module

    def _view(self, subset: Subset, statistics: Statistics, calls: HeldCalls | None) -> SubsetView:
        specs = {}
        for name in subset.linears:
            spec = self.context.recipe.spec_of(self.index, name, f"{self.prefix}.{name}")
            if spec is not None:
                specs[name] = spec
        return SubsetView(
            subset=subset,
            linears={name: self._linear(name) for name in subset.linears},
            specs=specs,
            prev=None if subset.prev is None else self.block.get_submodule(subset.prev),
            heads=self.context.heads,
            stats=statistics,
            calls=calls,
            clips=self.clips,
        )

    def _accept(self, view: SubsetView) -> None:
        """Take over a subset's results. Quantized weights go live at once: a waiting batch goes on with them."""
        self.notes |= view.notes
        for name, weight in view.quantized.items():
            self.quantized[name] = weight
            linear = self._linear(name)
            linear.weight.data = weight.dequantize(linear.weight.dtype)

    def _fold(self, view: SubsetView) -> None:
        if view.scale is None or view.prev is None:
            return
        scale, rule = view.scale
        linears, prev = list(view.linears.values()), f"{self.prefix}.{view.subset.prev}"
        if view.shift is not None:
            fold_shift(view.prev, linears, view.shift, self.stored[f"{prev}.bias"][1])
        fold_scale(view.prev, linears, scale, rule, self.stored[f"{prev}.weight"][1])
        self.scales["+".join(view.subset.linears)] = [float(scale.min()), float(scale.max())]

    def _store_plain(self) -> None:
        """Round what won't be quantized to its stored dtype, so that the model goes on with what is written."""
        for name, parameter in self._parameters():
            owner = name.removeprefix(f"{self.prefix}.").rpartition(".")[0]
            spec = self.context.recipe.spec_of(self.index, owner, f"{self.prefix}.{owner}")
            if (
                spec is None
                or not name.endswith(".weight")
                or not isinstance(self.block.get_submodule(owner), nn.Linear)
            ):
                parameter.data.copy_(parameter.data.to(self.stored[name][1]))

    # --- results -----------------------------------------------------------------------------------------------------

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        named = ((f"{self.prefix}.{name}", parameter) for name, parameter in self.block.named_parameters())
        return [(name, parameter) for name, parameter in named if name in self.stored]

    def record(self, *, quantized: bool) -> UnitRecord:
        """The block as it is to be stored: with codes, or (``quantized=False``) transformed but not rounded."""
        codes = {f"{self.prefix}.{name}.weight": weight for name, weight in self.quantized.items()} if quantized else {}
        plain = {}
        for name, parameter in self._parameters():
            if name not in codes:
                stored_name, dtype = self.stored[name]
                plain[stored_name] = parameter.data.to(dtype).cpu()
        named = {self.stored[name][0].removesuffix(".weight"): weight.to("cpu") for name, weight in codes.items()}
        return UnitRecord(plain=plain, quantized=named)

    def set_weights(self, record: UnitRecord) -> None:
        """Give the block the weights of a record that was read back."""
        dense = {f"{name}.weight": weight.dequantize() for name, weight in record.quantized.items()}
        for name, parameter in self._parameters():
            stored_name = self.stored[name][0]
            tensor = dense[stored_name] if stored_name in dense else record.plain[stored_name]
            parameter.data.copy_(tensor)

    @contextmanager
    def holding(self, record: UnitRecord) -> Iterator[None]:
        """Within the context the block has a record's weights."""
        kept = [(parameter, parameter.data) for _, parameter in self._parameters()]
        try:
            for parameter, data in kept:
                parameter.data = torch.empty_like(data)
            self.set_weights(record)
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data
