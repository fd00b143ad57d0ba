"""Runs a block on all calibration batches, stopping where a subset's shared input appears.

``run_staged`` needs one forward a batch: each batch runs in a greenlet of its own up to the point where a Linear of the
subset is about to be called, and waits there until the subset is solved; then it goes on with the compressed weights.
What it holds while it waits (the residual, the subset's input) is what a capture would have kept anyway.

``run_replayed`` runs the whole block again for every subset. It holds one batch at a time, so it's for blocks whose
held activations don't fit, and it's the oracle of the other: same statistics, same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..algorithms import Statistics
from .activations import Stream
from .calls import Call
from .memory import trim_heap, unheaped

Solve = Callable[[int, Statistics, "HeldCalls"], None]
"""Called with a stage's index, its statistics and the inspected module's calls."""


@dataclass(frozen=True)
class Stage:
    """A subset as the runner sees it.

    Attributes:
        linears: the modules that read the shared input.
        inspect: the module whose calls are kept for the search, or None if nobody asks.
        new_statistics: makes empty statistics.
        rotate: what a hook of the Linears does to the shared input before they read it; None: nothing.
    """

    linears: tuple[nn.Module, ...]
    inspect: nn.Module | None
    new_statistics: Callable[[], Statistics]
    rotate: Callable[[Tensor], Tensor] | None = None

    def observe(self, statistics: Statistics, inputs: Tensor) -> None:
        """Add tokens ``[..., in]`` to the statistics as the Linears will read them, but for rounding."""
        statistics.update(inputs if self.rotate is None else self.rotate(inputs))


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
    """One batch's forward; ``stage`` is where it waits, or the number of stages when it has ended."""

    stage = -1
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
    statistics = Statistics()  # of the stage that the batches are running to
    hooks = []

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            batch = greenlet.getcurrent()
            if isinstance(batch, _Waiting) and batch.passed < index:
                batch.stage = index
                stages[index].observe(statistics, args[0])
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
            hooks += [_first(linear, before(index)) for linear in stage.linears]
        for stage in stages:
            # The hook of a Linear that is its own witness must see the call before the batch is held there.
            if stage.inspect is not None:
                hooks.append(stage.inspect.register_forward_pre_hook(inspect, prepend=True, with_kwargs=True))
        for index, stage in enumerate(stages):
            statistics = _begin(stage)
            for batch in waiting:
                if batch.stage < index:
                    batch.switch()
            trim_heap()
            calls = [batch.inspected for batch in waiting if batch.stage == index and batch.inspected is not None]
            solve(index, statistics, HeldCalls(stage.inspect or run.block, calls))
            statistics = Statistics()
            for batch in waiting:
                batch.inspected = None
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
        statistics = _begin(stage)
        calls = HeldCalls(stage.inspect or run.block)
        for batch in range(len(run.inputs)):
            _observe(run, batch, stage, statistics, calls)
        solve(index, statistics, calls)
    if keep:
        propagate(run)


class _Reached(Exception):
    """The subset's input has been seen: the rest of the block isn't needed."""


def _observe(run: BlockRun, batch: int, stage: Stage, statistics: Statistics, calls: HeldCalls) -> None:
    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        stage.observe(statistics, args[0])
        raise _Reached

    def inspect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.held.append((args, kwargs))

    hooks = [_first(linear, before) for linear in stage.linears]
    if stage.inspect is not None:
        hooks.append(stage.inspect.register_forward_pre_hook(inspect, prepend=True, with_kwargs=True))
    try:
        run.forward(batch)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def run_together(run: BlockRun, stages: Sequence[Stage], solve: Solve, *, keep: bool) -> None:
    """Statistics of all subsets from one forward of the unchanged block, then solve them all: no held activations.

    For quantizers that don't ask for sequential calibration and inspect no module.
    """
    statistics = [_begin(stage) for stage in stages]
    seen: set[int] = set()

    def observe(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            stages[index].observe(statistics[index], args[0])
            seen.add(index)
            if len(seen) == len(stages) and not keep:
                raise _Reached

        return hook

    hooks = [_first(stage.linears[0], observe(index)) for index, stage in enumerate(stages)]
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
        solve(index, statistics[index], HeldCalls(stage.inspect or run.block))
