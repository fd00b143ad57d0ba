"""One forward in stages gives what one forward for each subset gives: same statistics, same bytes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import greenlet
import pytest
import torch
from torch import Tensor, nn

from llmc.algorithms import new_statistics
from llmc.stream.activations import Stream
from llmc.stream.batch import Batch
from llmc.stream.calls import record
from llmc.stream.stages import BlockRun, Observed, Stage, propagate, run_replayed, run_staged, run_together

CPU = torch.device("cpu")
RUNNERS = [run_staged, run_replayed]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@dataclass
class Work:
    """A block of its own with its inputs and stages, and a solve that rounds weights and notes what it sees."""

    run: BlockRun
    stages: list[Stage]
    grams: list[Tensor] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def solve(self, index: int, observed: Sequence[Observed]) -> None:
        statistics = observed[0].statistics
        assert index == len(self.grams)
        self.grams.append(statistics.gram.matrix.clone())
        self.means.append(statistics.abs_mean.mean)
        self.counts.append(statistics.gram.tokens)
        self.round(index)

    def round(self, index: int) -> None:
        for linear in self.stages[index].watched:
            linear.weight.data = (linear.weight.data * 8).round() / 8

    @property
    def hidden(self) -> list[Tensor]:
        return [self.run.inputs.load(batch, CPU).clone() for batch in range(len(self.run.inputs))]

    @property
    def hooks(self) -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in self.run.block.modules())


@pytest.fixture(scope="module")
def templates() -> dict[str, tuple]:
    """A block with its inputs and calls, by checkpoint."""
    return {}


@pytest.fixture
def make(tokens, templates):
    """Makes equal pieces of work, as often as asked, from batches of different sizes."""

    def make(tiny) -> Work:
        if tiny.name not in templates:
            skeleton = tiny.loaded()
            cpu, shapes = torch.device("cpu"), [(1, 12), (2, 9), (1, 12)]
            batches = [record(skeleton, Batch(tokens(*shape)), cpu) for shape in shapes]
            hidden, calls = [one.hidden for one in batches], [one.calls[1] for one in batches]
            templates[tiny.name] = skeleton.blocks[1], hidden, calls, tiny.subsets
        original, hidden, calls, subsets = templates[tiny.name]
        block = copy.deepcopy(original)
        stages = []
        for subset in subsets:
            linears = tuple(block.get_submodule(name) for name in subset.linears)
            statistics = partial(new_statistics, {"gram", "abs_mean"}, linears[0].in_features, CPU)
            stages.append(Stage(linears, block.get_submodule(subset.inspect), statistics))
        return Work(BlockRun(block, Stream("calib", [part.clone() for part in hidden]), calls, CPU), stages)

    return make


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def live_greenlets() -> int:
    return sum(issubclass(type(one), greenlet.greenlet) and bool(one) for one in gc.get_objects())


def test_staged_and_replayed_see_the_same_and_leave_the_same(tiny, make):
    staged, replayed = make(tiny), make(tiny)
    run_staged(staged.run, staged.stages, staged.solve, keep=True)
    run_replayed(replayed.run, replayed.stages, replayed.solve, keep=True)
    assert staged.counts == [12 + 18 + 12] * len(staged.stages)
    assert equal(staged.grams, replayed.grams)
    assert equal(staged.means, replayed.means)
    assert equal(staged.hidden, replayed.hidden)
    assert equal(list(staged.run.block.parameters()), list(replayed.run.block.parameters()))


def test_staged_outputs_are_those_of_the_changed_weights(tiny, make):
    staged, plain = make(tiny), make(tiny)
    unchanged = make(tiny)
    run_staged(staged.run, staged.stages, staged.solve, keep=True)
    for index in range(len(plain.stages)):
        plain.round(index)
    propagate(plain.run)
    propagate(unchanged.run)
    assert equal(staged.hidden, plain.hidden)
    assert not equal(staged.hidden, unchanged.hidden)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_later_subset_sees_the_changed_weights_of_the_earlier_ones(tiny, make, runner):
    work = make(tiny)
    runner(work.run, work.stages, work.solve, keep=False)
    for index, found in enumerate(work.grams):
        plain, original = make(tiny), make(tiny)
        for earlier in range(index):
            plain.round(earlier)
        assert torch.equal(found, input_gram(plain, index))
        assert torch.equal(found, input_gram(original, index)) == (index == 0)


def input_gram(work: Work, index: int) -> Tensor:
    stage = work.stages[index]
    statistics = stage.new_statistics()
    hook = stage.watched[0].register_forward_pre_hook(lambda _, args: statistics.update(args[0]))
    for batch in range(len(work.run.inputs)):
        work.run.forward(batch)
    hook.remove()
    return statistics.gram.matrix


@pytest.mark.parametrize("runner", [*RUNNERS, run_together])
def test_inputs_stay_unless_outputs_are_to_be_kept(llama, make, runner):
    work = make(llama)
    before = work.hidden
    runner(work.run, work.stages, work.solve, keep=False)
    assert equal(work.hidden, before)


@pytest.mark.parametrize("runner", RUNNERS)
def test_held_calls_reproduce_the_output_of_the_inspected_module(tiny, make, runner):
    work = make(tiny)
    compared = []

    def solve(index: int, observed: Sequence[Observed]) -> None:
        inspected, calls = work.stages[index].inspect, observed[0].calls
        assert calls.module is inspected
        assert len(calls) == len(work.run.inputs)
        compared.append(equal([calls.output(batch) for batch in range(len(calls))], outputs_of(make(tiny), index)))

    runner(work.run, work.stages, solve, keep=False)
    assert compared == [True] * len(work.stages)


def outputs_of(work: Work, index: int) -> list[Tensor]:
    outputs: list[Tensor] = []
    work.stages[index].inspect.register_forward_hook(
        lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    for batch in range(len(work.run.inputs)):
        work.run.forward(batch)
    return outputs


@pytest.mark.parametrize("runner", RUNNERS)
def test_held_calls_follow_the_weights_and_disturb_neither_statistics_nor_outputs(llama, make, runner):
    searching, plain = make(llama), make(llama)

    def solve(index: int, observed: Sequence[Observed]) -> None:
        first = searching.stages[index].watched[0]
        calls = observed[0].calls
        before, kept = calls.output(1), first.weight.data
        first.weight.data = kept * 2
        assert not torch.equal(calls.output(1), before)
        first.weight.data = kept
        assert torch.equal(calls.output(1), before)
        searching.solve(index, observed)

    runner(searching.run, searching.stages, solve, keep=True)
    runner(plain.run, plain.stages, plain.solve, keep=True)
    assert equal(searching.grams, plain.grams)
    assert equal(searching.hidden, plain.hidden)


def test_together_sees_the_unchanged_block_and_keeps_its_outputs(tiny, make):
    work, plain = make(tiny), make(tiny)
    expected = [input_gram(plain, index) for index in range(len(plain.stages))]
    propagate(plain.run)
    run_together(work.run, work.stages, work.solve, keep=True)
    assert equal(work.grams, expected)
    assert equal(work.hidden, plain.hidden)
    assert not torch.equal(work.stages[0].watched[0].weight, plain.stages[0].watched[0].weight)


@pytest.mark.parametrize("runner", [*RUNNERS, run_together])
@pytest.mark.parametrize("keep", [True, False])
def test_the_last_linear_is_computed_only_for_outputs_that_are_kept(tiny, make, runner, keep):
    work, computed = make(tiny), []
    work.stages[-1].watched[-1].register_forward_hook(lambda *_: computed.append(True))
    runner(work.run, work.stages, work.solve, keep=keep)
    assert len(work.grams) == len(work.stages)
    assert len(computed) == keep * len(work.run.inputs)


@pytest.mark.parametrize("runner", [*RUNNERS, run_together])
def test_no_hook_and_no_greenlet_is_left_behind(llama, make, runner):
    work, before = make(llama), live_greenlets()
    runner(work.run, work.stages, work.solve, keep=True)
    assert work.hooks == 0
    assert live_greenlets() == before


@pytest.mark.parametrize("failing", range(4))
@pytest.mark.parametrize("runner", [*RUNNERS, run_together])
def test_an_exception_in_solve_comes_through_and_leaves_nothing(llama, make, runner, failing):
    work, before = make(llama), live_greenlets()
    inputs = work.hidden

    def solve(index: int, observed: Sequence[Observed]) -> None:
        if index == failing:
            raise KeyError("singular")
        work.round(index)

    with pytest.raises(KeyError, match="singular"):
        runner(work.run, work.stages, solve, keep=False)
    assert work.hooks == 0
    assert live_greenlets() == before
    assert equal(work.hidden, inputs)


@pytest.mark.parametrize("runner", [*RUNNERS, run_together])
def test_an_exception_in_the_block_comes_through_and_leaves_nothing(llama, make, runner):
    work, before = make(llama), live_greenlets()
    calls = 0

    class Failing(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise ArithmeticError("overflow")
            return hidden

    work.run.block.input_layernorm = Failing()
    with pytest.raises(ArithmeticError, match="overflow"):
        runner(work.run, work.stages, work.solve, keep=False)
    assert work.hooks == 0
    assert live_greenlets() == before


def test_staged_runs_every_batch_once(llama, make):
    work = make(llama)
    entered = []
    work.run.block.input_layernorm.register_forward_pre_hook(lambda _, args: entered.append(args[0].shape))
    run_staged(work.run, work.stages, work.solve, keep=True)
    assert len(entered) == len(work.run.inputs)
