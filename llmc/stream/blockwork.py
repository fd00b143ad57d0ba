"""What the recipe does to one block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..algorithms import (
    BlockView,
    ClipRatios,
    Frame,
    LayerNote,
    Online,
    Recipe,
    Statistics,
    Step,
    SubsetView,
    TuneNote,
    treat_unseen,
)
from ..models import Heads, Subset
from ..models.experts import LinearExperts, working_on
from ..quant import InputRange, InputSquares, KvRanges, QWeight, UnitRecord
from .analysis import BlockAnalysis
from .block_subsets import BlockSubsets, Findings
from .clustered import ClusteredBlock
from .folding import fold
from .inputs import BlockInputs, Readers
from .memory import trim_heap, unheaped
from .parts import Unit, solved_units, transformed_units
from .squares import observe_squares
from .stages import BlockRun, Observed, propagate, run_replayed, run_staged, run_together
from .stored import StoredBlock
from .stored_ranges import input_ranges, stored_cache_scales
from .training import LearningCalls, repeatable
from .visits import Visits


@dataclass(frozen=True)
class WorkContext:
    """What is the same for all blocks. The frame is there if a transform changes weights as they're loaded; ``online``
    is what runs with the model that it made."""

    recipe: Recipe
    heads: Heads
    device: torch.device
    forward: Literal["auto", "staged", "replay"]
    frame: Frame | None = None
    online: Online = field(default_factory=Online)


@dataclass
class BlockWork:
    """Carries a loaded block through the recipe.

    Attributes:
        context: what is the same for all blocks.
        subsets: of the block.
        index: the block's number.
        block: the module, with its original weights.
        prefix: its name in the model.
        stored: for each of its parameters, by the model's name, the checkpoint's name and dtype.
        quantized: results by name in the block.
        notes: what the report says, by name in the block.
        scales: largest and smallest folded input scale of each subset.
        inputs: what rounds the Linears' inputs.
        weights: the block's parameters as the checkpoint has them.
        clustered: what rounds tensors inside the block by clusters of channels; None where the recipe doesn't.
        ranges: of the block's keys and values, for a static KV cache.
        tuning: what the report says of learning the block, if it was learned.
        analysis: looks at what becomes of the Linears; None: nobody does.
    """

    context: WorkContext
    subsets: tuple[Subset, ...]
    index: int
    block: nn.Module
    prefix: str
    stored: Mapping[str, tuple[str, torch.dtype]]
    analysis: BlockAnalysis | None = None
    quantized: dict[str, QWeight] = field(default_factory=dict)
    notes: dict[str, LayerNote] = field(default_factory=dict)
    clips: dict[str, ClipRatios] = field(default_factory=dict)
    pruned: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, list[float]] = field(default_factory=dict)
    squares: dict[str, InputSquares] = field(default_factory=dict)
    ranges: KvRanges | None = None
    tuning: TuneNote | None = None
    _pending: list[Tensor] | None = None
    _behind: bool = False
    inputs: BlockInputs = field(init=False)
    weights: StoredBlock = field(init=False)
    clustered: ClusteredBlock | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.weights = StoredBlock(self.block, self.prefix, self.stored)
        recipe = self.context.recipe
        shared = self.context
        self._visits = Visits.of(self.block)
        shares = (shared.heads, shared.online, shared.device, self._visits.home)
        self._own = BlockSubsets(recipe, self.index, self.block, self.prefix, *shares)
        self._solved = solved_units(self.subsets)
        for module in self.block.modules():
            if isinstance(module, LinearExperts):
                module.all_tokens = recipe.experts.all_tokens
        readers: dict[str, Readers] = {}
        for unit in self._solved if recipe.steps else ():
            schemes, act = self._own.schemes_of(unit.subset), self._own.act_of(unit.subset)
            if act is not None:
                rounding = [self._own.linear(name) for name, scheme in schemes.items() if scheme.act is not None]
                readers[unit.subset.key] = Readers(act, rounding, -(-len(rounding) // len(unit.parts)))
        rotated = [
            (self._own.linear(name), rotation)
            for subset in self.subsets
            if (rotation := self.context.online.of_input(subset)) is not None
            for name in subset.linears
        ]
        self.inputs = BlockInputs(readers, rotated)
        if recipe.clusters:
            parts = (self.block, self.subsets, self.context.heads, self.context.device)
            self.clustered = ClusteredBlock(*parts, attends=recipe.clustered is not None)

    def load(self) -> None:
        """Let the transforms change the block that need no data.

        What won't be quantized is rounded to its stored dtype at once: whoever runs the block sees the same weights, in
        a resumed run too.
        """
        frame = self.context.frame
        if frame is not None and self.context.recipe.at_load:
            for algorithm in self.context.recipe.at_load:
                algorithm.block(self.block, self.index, frame)
            self._store_plain()

    def transform(self, original: BlockRun | None, compressed: BlockRun | None) -> None:
        """Run the transforms, then the pruner. Brings the original calibration stream behind the block.

        A transform folds only when it has seen all subsets, so its forward is that of the unchanged block, and its
        outputs are the original stream's next inputs for nothing. Where several steps read that stream, or one changes
        weights on the way, or learns those outputs, they are computed beforehand and take the inputs' place when all
        have read them; where nobody reads the inputs, at once.
        """
        readers = [s for s in self._data_steps() if not s.needs.compressed_stream]
        observes = self.context.recipe.observes
        single = len(readers) == 1 and not observes and not (readers[0].needs.sequential or readers[0].needs.targets)
        first = single and readers[0] is self.context.recipe.in_block[0]
        pending = None
        if original is not None and not readers and not observes:
            propagate(original)
        elif original is not None and not first:
            pending = [original.forward(batch).cpu() for batch in range(len(original.inputs))]
        for step in self.context.recipe.in_block:
            run = compressed if step.needs.compressed_stream else original
            if step.algorithm.kind == "transform":
                self._phase(step, run, keep=run is original and first)
            elif step.algorithm.kind == "pruner":
                self._store_plain()
                self._prune(step, run, keep=run is original and first)
        self._pending = pending
        self._store_plain()
        if observes and original is not None:
            context = self.context
            self.squares = observe_squares(original, self.subsets, context.online, context.device)

    def _prune(self, step: Step, run: BlockRun | None, *, keep: bool) -> None:
        """Run the pruner. With nothing behind it, a staged forward ends with the block's final weights."""
        last = step is self.context.recipe.steps[-1]
        self._behind = last and step.needs.data and step.needs.sequential and step.needs.compressed_stream
        self._phase(step, run if step.needs.data else None, keep=keep or self._behind)

    def quantize(self, original: BlockRun | None, compressed: BlockRun | None) -> bool:
        """Run the quantizer, if there is one. Returns whether the compressed stream already is behind the block."""
        if not self.context.recipe.steps:
            return False
        step = self.context.recipe.steps[-1]
        if step.algorithm.kind == "transform":
            raise ValueError("a recipe ends with a pruner or a quantizer")
        if step.algorithm.kind == "quantizer":
            run = compressed if step.needs.compressed_stream else original
            if step.algorithm.learns and not (run is not None and run.left_out):
                with working_on(self.block, self.block.modules()):
                    self._learn(step, run, original)
                self._phase(step, None, keep=False)
                self._check_all_quantized()
                self._flush(original)
                return False
            self._behind = step.needs.data and step.needs.sequential and step.needs.compressed_stream
            keep = self._behind if run is compressed else self._pending is None and original is not None
            self._phase(step, run if step.needs.data else None, keep=keep)
            self._check_all_quantized()
            if self.clustered is not None:
                self.quantized = self.clustered.reorder(self.quantized)
                self.weights.gathered = self.clustered.gathered
        self._flush(original)
        return self._behind

    def _check_all_quantized(self) -> None:
        left = [name for name in self._to_quantize() if name not in self.quantized]
        if left and self.context.recipe.steps[-1].algorithm.delivers:
            raise ValueError(f"{self.prefix}.{left[0]} has a grid and wasn't quantized")

    def _flush(self, original: BlockRun | None) -> None:
        """Put the original block's outputs in their inputs' place, if they are still waiting."""
        if original is not None and self._pending is not None:
            for batch, output in enumerate(self._pending):
                original.inputs.store(batch, output)
        self._pending = None

    def _data_steps(self) -> list[Step]:
        return [step for step in self.context.recipe.steps if step.needs.data]

    @property
    def _findings(self) -> Findings:
        return Findings(self.clips, self.pruned, None if self.clustered is None else self.clustered.watched)

    # --- one step ----------------------------------------------------------------------------------------------------

    def _phase(self, step: Step, run: BlockRun | None, *, keep: bool) -> None:
        """One step over all subsets. A block that every batch passes by gets what needs no data."""
        views: list[SubsetView] = []
        searching, unseen = step.algorithm.kind == "transform", run is not None and run.left_out
        every = transformed_units(self.subsets) if searching else self._solved
        units = [unit for unit in every if step.algorithm.covers(unit.subset)]
        analysis, rounds = None if searching else self.analysis, step.algorithm.kind == "quantizer"
        if analysis is not None:
            analysis.look()

        def solve(position: int, observed: Sequence[Observed]) -> None:
            unit, last = units[position], observed[-1]
            ranges = (last.pooled or last.statistics).ranges if rounds else None
            found = None if ranges is None else InputRange(*ranges.range())
            for group in self._visits.groups(unit, observed):
                solve_group(unit, group, found)
            if rounds and last.part + 1 == len(unit.parts):
                self.inputs.switch_on(unit.subset.key, found)
            trim_heap()

        def solve_group(unit: Unit, observed: Sequence[Observed], found: InputRange | None) -> None:
            seen = [(one, *self._own.enough(one, unit, step.algorithm)) for one in observed]
            own = [
                self._own.view(unit.parts[one.part], statistics, one.calls, self._findings)
                for one, statistics, _ in seen
            ]
            # A search makes many small copies, again and again; others a few large ones, once.
            with nullcontext() if searching else unheaped(), self._visits.during(unit, own):
                if unseen:
                    for view in own:
                        treat_unseen(step.algorithm, view)
                else:
                    step.algorithm.solve(own)
                if analysis is not None:
                    analysis.compare(unit, observed, own, found, rounds=rounds)
                for view, (one, _, wanted) in zip(own, seen, strict=True):
                    if unit.experts:
                        notes = view.notes.items()
                        view.notes = {name: replace(note, tokens=one.tokens, wanted=wanted) for name, note in notes}
                    self._accept(view)
            for view in own:
                view.release()  # the Gram matrices of a block needn't live side by side
            views.extend(own)

        if run is None or unseen:
            for position, unit in enumerate(units):
                for part in range(len(unit.parts)):  # experts on the host visit the device one at a time
                    solve(position, [Observed(part, Statistics(), None)])
        else:
            stages = [self._own.stage(unit, step.algorithm, searching=searching) for unit in units]
            with ExitStack() as stack:
                if self.clustered is not None and step.algorithm.clusters:
                    stack.enter_context(self.clustered.watching())
                stack.enter_context(run.attention())
                self._runner(step, searching)(run, stages, solve, keep=keep)
        self._fold(views)

    def _learn(self, step: Step, run: BlockRun | None, original: BlockRun | None) -> None:
        """Let the step learn scales and clips against the original block's outputs, and fold what it found.

        Raises:
            ValueError: a stream is missing.
        """
        if run is None or original is None:
            raise ValueError(f"{step.algorithm.name} needs calibration streams of both models")
        if run is not original:
            self._flush(original)  # nobody reads the original's inputs any more
        pending = self._pending
        targets = partial(original.inputs.load, device=run.device) if pending is None else pending.__getitem__
        units = transformed_units(self.subsets)
        parts = [[self._own.view(part, Statistics(), None, self._findings) for part in unit.parts] for unit in units]
        views = [view for own in parts for view in own]
        if not any(view.specs for view in views):
            return  # the whole block is to stay as it is
        if step.algorithm.statistics:

            def look(position: int, observed: Sequence[Observed]) -> None:
                for one in observed:
                    parts[position][one.part].stats = one.statistics

            stages = [self._own.stage(unit, step.algorithm, searching=False) for unit in units]
            run_together(run, stages, look, keep=False)
        weights = {name: parameter.data for name, parameter in self.block.named_parameters()}
        transformed = any(one.algorithm.kind == "transform" for one in self.context.recipe.in_block)
        calls = LearningCalls(run, self.inputs, targets)
        with repeatable(self.context.device):
            self.tuning = step.algorithm.tune(BlockView(views, weights, calls, transformed))
        self._fold(views)
        self._store_plain()

    def _runner(self, step: Step, searching: bool) -> Callable[..., None]:
        if not step.needs.sequential and not searching:
            return run_together
        return run_replayed if self.context.forward == "replay" else run_staged

    def _accept(self, view: SubsetView) -> None:
        """Take over a subset's results. Compressed weights go live at once: a waiting batch goes on with them.

        Raises:
            ValueError: a quantizer has revived pruned weights.
        """
        self.notes |= {name: note.behind(self.notes.get(name)) for name, note in view.notes.items()}
        for name, pruned in view.weights.items():
            self.pruned[name] = self._visits.kept(view.subset, self.pruned[name])
            linear = self._own.linear(name)
            # What no quantizer follows is stored like this: go on with what is written.
            final = name not in view.specs
            stored = self.weights.dtype(f"{name}.weight") if final else linear.weight.dtype
            linear.weight.data = pruned.to(stored).to(linear.weight.dtype)
        if self.clustered is not None:
            self.clustered.take(view.subset, view.clusters)
        for name, weight in view.quantized.items():
            self.quantized[name] = self._visits.kept(view.subset, weight)
            linear = self._own.linear(name)
            linear.weight.data = weight.dequantize(linear.weight.dtype)
            if name in self.pruned and linear.weight.data[self.pruned[name]].any():
                raise ValueError(f"{self.prefix}.{name}: the quantizer has revived pruned weights")

    def analyzed(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the journal has of the finished block's Linears, by name, and of their inputs, by the subsets' keys. The
        analysis' sample is behind the block then."""
        if self.analysis is None:
            return {name: note.to_dict() for name, note in self.notes.items()}, {}
        found = self.analysis.activations(self.inputs.static)
        self.analysis.keep_surfaces({name: self.weights.module(name) for one in self.subsets for name in one.linears})
        self.analysis.pass_compressed()
        return self.analysis.rows(self.notes), found

    def restore(self, record: UnitRecord, row: Mapping[str, Any]) -> None:
        """Become the block that an earlier run wrote: its record, read back, and its line in the journal."""
        if self.clustered is not None:
            self.clustered.restore(row["clusters"])
            self.weights.gathered = self.clustered.gathered
        self.weights.set(record)
        self.inputs.restore(row["inputs"])

    def remove_hooks(self) -> None:
        """Leave the block as a module without any."""
        self.inputs.remove()
        if self.clustered is not None:
            self.clustered.remove()

    def _fold(self, views: Sequence[SubsetView]) -> None:
        for view in views:
            ends = fold(view, self._visits, self.weights)
            if ends is not None:
                self.scales[view.subset.key] = list(ends)

    def _store_plain(self) -> None:
        """Round what won't be quantized to its stored dtype, so that the model goes on with what is written."""
        rounded = {f"{name}.weight" for name in self._to_quantize()}
        for name, parameter in self.weights.parameters():
            if name not in rounded:
                parameter.data.copy_(parameter.data.to(self.weights.dtype(name)))

    def _to_quantize(self) -> list[str]:
        """The Linears with a grid. Those in no subset, such as the gate of a shared expert, have none."""
        names = (name for subset in self.subsets for name in subset.linears)
        return [name for name in names if self._own.scheme_of(name).weight is not None]

    # --- results -----------------------------------------------------------------------------------------------------

    def record(self, *, quantized: bool) -> UnitRecord:
        """The block as it is to be stored: with codes, or (``quantized=False``) transformed but not rounded."""
        if not quantized:
            return UnitRecord(plain=self.weights.plain())
        codes = {self.weights.module(name): weight.to("cpu") for name, weight in self.quantized.items()}
        plain = self.weights.plain(leave_out=self.quantized)
        squares = {self.weights.module(name): one for name, one in self.squares.items()}
        inputs = input_ranges(self._solved, self.inputs.found, self._own, self.weights)
        cache = stored_cache_scales(self.subsets, self.context.recipe.kv, self.ranges, self.weights)
        return UnitRecord(plain, codes, inputs=inputs, cache=cache, squares=squares)
