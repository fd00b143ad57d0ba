"""Runs a block on all calibration batches, stopping where a subset's shared input appears.

``run_staged`` needs one forward a batch: each batch runs in a greenlet of its own up to the point where a Linear of the
subset is about to be called, and waits there until the subset is solved; then it goes on with the compressed weights.
What it holds while it waits (the residual, the subset's input) is what a capture would have kept anyway.

``run_replayed`` runs the whole block again for every subset. It holds one batch at a time, so it's for blocks whose
held activations don't fit, and it's the oracle of the other: same statistics, same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..algorithms import InspectCalls, Statistics
from .activations import Stream
from .calls import Call
from .memory import trim_heap, unheaped

Solve = Callable[[int, "Sequence[Observed]"], None]
"""Called with a stage's index and what was seen of those of its parts that are to be solved together."""


@dataclass(frozen=True)
class Stage:
    """A subset as the runner sees it.

    Attributes:
        watched: the modules that read the shared input, the first of which is waited at; of experts, the port that
            shows the inputs of all.
        inspect: the module whose calls are kept for the search, or None if nobody asks.
        new_statistics: makes empty statistics.
        rotate: what a hook of the Linears does to the shared input before they read it; None: nothing.
        experts: of a mixture's Linears, the expert of each part; empty where there is one part, which reads everything.
        together: how many of them are solved at a time.
        scarce: tokens below which an expert is given the statistics of all of them, too.
        ranged: whether all parts' inputs together are always wanted, to find their common range.
        modules: each expert's Linear, where a search repeats its calls.
    """

    watched: tuple[nn.Module, ...]
    inspect: nn.Module | None
    new_statistics: Callable[[], Statistics]
    rotate: Callable[[Tensor], Tensor] | None = None
    experts: tuple[int, ...] = ()
    together: int = 1
    scarce: int = 0
    ranged: bool = False
    modules: tuple[nn.Module, ...] = ()

    def observe(self, statistics: Statistics, inputs: Tensor) -> None:
        """Add tokens ``[..., in]``, if there are any, to the statistics as the Linears will read them, but for
        rounding."""
        if inputs.numel():
            statistics.update(inputs if self.rotate is None else self.rotate(inputs))


@dataclass(frozen=True)
class Observed:
    """What was seen of a part of a stage.

    Attributes:
        part: its index.
        statistics: of its own inputs.
        calls: of the inspected module, or of an expert's Linear.
        tokens: how many its inputs were; None where nobody counts: of a stage without experts, or without data.
        pooled: statistics of all parts' inputs together, where asked for.
    """

    part: int
    statistics: Statistics
    calls: InspectCalls | None
    tokens: int | None = None
    pooled: Statistics | None = None


@dataclass
class HeldCalls:
    """Calls of one module on the batches that wait (an ``InspectCalls``)."""

    module: nn.Module
    held: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.held)

    def output(self, batch: int) -> Tensor:
        """Run the module again on batch ``batch``."""
        args, kwargs = self.held[batch]
        result = self.module(*args, **kwargs)
        output = result[0] if isinstance(result, tuple) else result
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(self.module).__name__} returned {type(output).__name__}")
        return output


def observations(stage: Stage, inputs: Iterable[Any], calls: HeldCalls) -> Iterator[list[Observed]]:
    """Statistics of a stage, for so many parts at a time as are solved together.

    Args:
        stage: the stage.
        inputs: what its watched modules were called with, of each batch: ``[..., in]``, or ``RoutedInputs``. It is gone
            through several times where there are many experts, or some with few tokens.
        calls: of the inspected module; they are there when the inputs have been gone through.
    """
    if not stage.experts:
        statistics = _begin(stage)
        for one in inputs:
            stage.observe(statistics, one)
        yield [Observed(0, statistics, calls)]
        return
    counts = [0] * len(stage.experts)
    common = True
    for routed in inputs:
        common &= routed.common
        for part, expert in enumerate(stage.experts):
            counts[part] += routed.tokens(expert)
    pooled = None
    if common:  # what everybody reads needs to be looked at once
        pooled = _begin(stage)
        for routed in inputs:
            stage.observe(pooled, routed.of(stage.experts[0]))
    elif stage.ranged or min(counts) < stage.scarce:
        pooled = _begin(stage)
        for routed in inputs:
            for expert in stage.experts:
                stage.observe(pooled, routed.of(expert))
    for start in range(0, len(stage.experts), stage.together):
        parts = range(start, min(start + stage.together, len(stage.experts)))
        own = {part: pooled if common and pooled is not None else _begin(stage) for part in parts}
        for routed in inputs if not common else ():
            for part, statistics in own.items():
                stage.observe(statistics, routed.of(stage.experts[part]))
        found = []
        for part, statistics in own.items():
            if stage.modules:
                calls = HeldCalls(stage.modules[part], [((one.of(stage.experts[part]),), {}) for one in inputs])
            found.append(Observed(part, statistics, calls, counts[part], pooled))
        yield found
        del own, found, statistics


@dataclass(frozen=True)
class BlockRun:
    """A block with its inputs.

    Attributes:
        block: the module.
        inputs: its inputs; overwritten by its outputs where ``keep`` says so.
        calls: the call for each batch.
        device: where the block is.
        attention: makes the context in which the block's forwards run: that of a quantized KV cache, or none.
    """

    block: nn.Module
    inputs: Stream
    calls: Sequence[Call]
    device: torch.device
    attention: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def left_out(self) -> bool:
        """Whether no batch reaches the block: the model calls it for other inputs only."""
        return all(call.left_out for call in self.calls)

    def forward(self, batch: int) -> Tensor:
        """Output of one batch with the weights as they are."""
        return self.calls[batch](self.block, self.inputs.load(batch, self.device))


def propagate(run: BlockRun) -> None:
    """Overwrite every input by the block's output."""
    with run.attention():
        for batch in range(len(run.inputs)):
            run.inputs.store(batch, run.forward(batch))


class _Waiting(greenlet.greenlet):
    """One batch's forward; ``stage`` is where it waits, or the number of stages when it has ended, and ``seen`` what
    the module there was called with."""

    stage = -1
    seen: Any = None
    inspected: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    passed = -1


def _first(linear: nn.Module, hook: Callable[..., None]) -> RemovableHandle:
    """Hook a Linear before whatever rotates and rounds its input: statistics are of the input as it comes, which the
    stage rotates, and a batch that waited in the hook has its input rounded as soon as the subset is compressed. A call
    that is held for a search comes as it is too: repeating it goes through the rotation again."""
    return linear.register_forward_pre_hook(hook, prepend=True)


def _begin(stage: Stage) -> Statistics:
    """Empty statistics, not in the heap: a Gram matrix would stay there while all that came before it is freed."""
    with unheaped():
        return stage.new_statistics()


def run_staged(run: BlockRun, stages: Sequence[Stage], solve: Solve, *, keep: bool) -> None:
    """One forward for each batch, in stages.

    Args:
        run: the block and its inputs.
        stages: the subsets in execution order.
        solve: called when all batches have reached a stage.
        keep: store the outputs over the inputs. They are the outputs of the weights that ``solve`` left.
    """
    hub = greenlet.getcurrent()
    hooks = []

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            batch = greenlet.getcurrent()
            if isinstance(batch, _Waiting) and batch.passed < index:
                batch.stage, batch.seen = index, args[0]
                hub.switch()
                batch.passed = index

        return hook

    def inspect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = greenlet.getcurrent()
        if isinstance(batch, _Waiting):
            batch.inspected = (args, kwargs)

    def body(batch: int) -> Callable[[], None]:
        def go() -> None:
            output = run.forward(batch)
            waiting[batch].stage = len(stages)
            if keep:
                run.inputs.store(batch, output)

        return go

    waiting = [_Waiting(body(batch)) for batch in range(len(run.inputs))]
    try:
        for index, stage in enumerate(stages):
            hooks += [_first(module, before(index)) for module in stage.watched]
        for stage in stages:
            # The hook of a Linear that is its own witness must see the call before the batch is held there.
            if stage.inspect is not None:
                hooks.append(stage.inspect.register_forward_pre_hook(inspect, prepend=True, with_kwargs=True))
        for index, stage in enumerate(stages):
            for batch in waiting:
                if batch.stage < index:
                    batch.switch()
            trim_heap()
            arrived = [batch for batch in waiting if batch.stage == index]
            calls = [batch.inspected for batch in arrived if batch.inspected is not None]
            seen = [batch.seen for batch in arrived]
            for observed in observations(stage, seen, HeldCalls(stage.inspect or run.block, calls)):
                solve(index, observed)
                observed.clear()
            del seen, calls
            for batch in waiting:
                batch.inspected = batch.seen = None
        for batch in waiting:
            if keep and not batch.dead:
                batch.switch()
    finally:
        for hook in hooks:
            hook.remove()
        for batch in waiting:
            if batch and not batch.dead:
                batch.throw(greenlet.GreenletExit)


def run_replayed(run: BlockRun, stages: Sequence[Stage], solve: Solve, *, keep: bool) -> None:
    """The same result by one forward for each batch and subset, and one more for the outputs."""
    for index, stage in enumerate(stages):
        calls = HeldCalls(stage.inspect or run.block)
        for observed in observations(stage, _Replayed(run, stage, calls), calls):
            solve(index, observed)
            observed.clear()
    if keep:
        propagate(run)


class _Reached(Exception):
    """The subset's input has been seen: the rest of the block isn't needed."""


@dataclass
class _Replayed:
    """What a stage's watched modules are called with, batch by batch; each going through runs all batches again."""

    run: BlockRun
    stage: Stage
    calls: HeldCalls

    def __iter__(self) -> Iterator[Any]:
        self.calls.held.clear()
        for batch in range(len(self.run.inputs)):
            yield from self._seen(batch)

    def _seen(self, batch: int) -> list[Any]:
        """What one batch shows; nothing if it passes the stage by."""
        seen: list[Any] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Reached

        def inspect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls.held.append((args, kwargs))

        hooks = [_first(module, before) for module in self.stage.watched]
        if self.stage.inspect is not None:
            hooks.append(self.stage.inspect.register_forward_pre_hook(inspect, prepend=True, with_kwargs=True))
        try:
            self.run.forward(batch)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return seen


def run_together(run: BlockRun, stages: Sequence[Stage], solve: Solve, *, keep: bool) -> None:
    """Statistics of all subsets from one forward of the unchanged block, then solve them all: no held activations.

    For quantizers that don't ask for sequential calibration and inspect no module. Where the statistics of so many
    experts wouldn't fit together, see ``_run_backwards``.
    """
    if any(len(stage.experts) > stage.together for stage in stages):
        _run_backwards(run, stages, solve, keep=keep)
        return
    parts = [[_begin(stage) for _ in stage.experts or (0,)] for stage in stages]
    pooled = [_begin(stage) if stage.experts else None for stage in stages]
    counts = [[0] * len(one) for one in parts]
    seen: set[int] = set()

    def look(index: int, inputs: Any) -> None:
        stage, together = stages[index], pooled[index]
        if together is None:
            stage.observe(parts[index][0], inputs)
            return
        if inputs.common:
            parts[index] = [together] * len(stage.experts)
            stage.observe(together, inputs.of(stage.experts[0]))
        for part, expert in enumerate(stage.experts):
            counts[index][part] += inputs.tokens(expert)
            if not inputs.common:
                stage.observe(parts[index][part], inputs.of(expert))
                stage.observe(together, inputs.of(expert))

    def observe(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            look(index, args[0])
            seen.add(index)
            if len(seen) == len(stages) and not keep:
                raise _Reached

        return hook

    hooks = [_first(stage.watched[0], observe(index)) for index, stage in enumerate(stages)]
    try:
        for batch in range(len(run.inputs)):
            seen.clear()
            with suppress(_Reached):
                output = run.forward(batch)
                if keep:
                    run.inputs.store(batch, output)
    finally:
        for hook in hooks:
            hook.remove()
    for index, stage in enumerate(stages):
        calls = HeldCalls(stage.inspect or run.block)
        solve(
            index,
            [Observed(part, own, calls, counts[index][part], pooled[index]) for part, own in enumerate(parts[index])],
        )
        parts[index].clear()
        pooled[index] = None


def _run_backwards(run: BlockRun, stages: Sequence[Stage], solve: Solve, *, keep: bool) -> None:
    """The same by forwards of its own for each group of parts, the last stage first: what is in front of a stage is
    still unchanged when it's observed."""
    outputs = [run.forward(batch).cpu() for batch in range(len(run.inputs))] if keep else []
    for index in reversed(range(len(stages))):
        calls = HeldCalls(stages[index].inspect or run.block)
        for observed in observations(stages[index], _Replayed(run, stages[index], calls), calls):
            solve(index, observed)
            observed.clear()
    for batch, output in enumerate(outputs):
        run.inputs.store(batch, output)
