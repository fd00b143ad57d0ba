"""Finds out what an adapter declares: the blocks of a model that nobody declared, and the Linears that share an input.

Nothing is read of a checkpoint. The model's own code runs on random weights in float64, one block at a time, and every
claim is checked there before it's made: that Linears read one tensor, and that a scale of it can be folded into what
made it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import ModelError
from .adapter import Heads, ModelAdapter, Subset, heads_of
from .discovery.calls import LONG, SHORT, BlockCall, Found, find_blocks
from .discovery.exact import fill
from .discovery.kinds import Fingerprint, fingerprint
from .discovery.mixtures import subset_of_experts
from .discovery.producers import Absorber, Producer, absorber_of, find_producers, fold_problem
from .discovery.readers import Group, Readers, expert_counts, find_readers
from .discovery.spaces import Map, Spaces, find_spaces
from .discovery.trial import Run, Trial

_NAME = "Discovered"


@dataclass(frozen=True)
class BlockFacts:
    """What was found of a block.

    Attributes:
        subsets: in execution order.
        reasons: why nothing can absorb a scale of a subset's input, by the subset's key.
        loose: why Linears, or what does a Linear's work, are in no subset, by their names in the block.
        heads: geometry of the attention, if several heads share a value head.
        problem: why the block can't be run on its own; then nothing else is known.
    """

    subsets: tuple[Subset, ...] = ()
    reasons: Mapping[str, str] | None = None
    loose: Mapping[str, str] | None = None
    heads: Heads | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Discovery:
    """What was found of a model.

    Attributes:
        path: of the list of blocks.
        head: modules behind the last block.
        blocks: what was found of each block.
        kinds: the same by the blocks' fingerprints.
        problem: why the engine can't pass from block to block, so that no block was looked at; None: it can.
    """

    path: str
    head: tuple[str, ...]
    blocks: tuple[BlockFacts, ...]
    kinds: Mapping[Fingerprint, BlockFacts]
    problem: str | None

    def adapter(self) -> ModelAdapter:
        """What was found, as if it had been declared.

        Raises:
            ModelError: the model can't be compressed block by block.
        """
        problem = self.problem or next((facts.problem for facts in self.blocks if facts.problem), None)
        if problem is not None:
            raise ModelError(f"this model can't be compressed block by block: {problem}", "there is no way around that")
        if not any(facts.subsets for facts in self.blocks):
            raise ModelError("no Linears were found in this model's blocks", "write an adapter: docs/adding.md")
        kinds = self.kinds

        def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
            facts = kinds.get(fingerprint(block))
            if facts is None:
                raise ModelError("a block isn't among those that were discovered", "write an adapter: docs/adding.md")
            return facts.subsets

        shared = next((facts.heads for facts in self.blocks if facts.heads is not None), None)

        def heads(config: PretrainedConfig) -> Heads:
            return shared or heads_of(config)

        return ModelAdapter(_NAME, (), self.path, self.head, subsets, heads=heads)


def discover(model: nn.Module, config: Any) -> Discovery:
    """Find the blocks and subsets of a causal language model.

    Args:
        model: with its parameters on the meta device, in eval mode, of dtype float64. It's used up.
        config: its configuration.

    Raises:
        ModelError: no blocks were found, or the model's code doesn't run.
    """
    text = config.get_text_config()
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation("eager")  # the others know no float64
    found = find_blocks(model, text)
    if found.problem is not None:
        return Discovery(found.path, found.head, (), {}, found.problem)
    blocks = model.get_submodule(found.path)
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(f"{found.path} is a {type(blocks).__name__}, not a list of blocks")
    members: dict[Fingerprint, list[int]] = {}
    for index, block in enumerate(blocks):
        members.setdefault(fingerprint(block), []).append(index)
    kinds = {}
    for kind, numbers in members.items():
        kinds[kind] = _facts(blocks[numbers[0]], _calls_of(found, numbers[0]), text)
        if numbers[-1] != numbers[0] and not _alike(blocks, numbers, found, text):
            reason = f"blocks {numbers[0]} and {numbers[-1]} are built alike, but share their inputs differently"
            kinds[kind] = BlockFacts(problem=reason)
    by_number = {index: kinds[kind] for kind, numbers in members.items() for index in numbers}
    return Discovery(found.path, found.head, tuple(by_number[i] for i in range(len(blocks))), kinds, found.problem)


def _calls_of(found: Found, index: int) -> dict[tuple[int, int], BlockCall]:
    return {shape: calls[index] for shape, calls in found.calls.items()}


@dataclass(frozen=True)
class _Shown:
    """What a block shows of each group of readers before a fold is tried: who could absorb a scale, or why nobody."""

    readers: Readers
    absorbers: tuple[Absorber | str, ...]
    map: Map


@contextmanager
def _trial(block: nn.Module, calls: Mapping[tuple[int, int], BlockCall], config: Any) -> Iterator[Trial]:
    """The block with random weights, which take little memory."""
    fill(block, "block")
    try:
        yield Trial(block, calls, config.hidden_size)
    finally:
        block.to("meta")


def _alike(blocks: nn.ModuleList, numbers: Sequence[int], found: Found, config: Any) -> bool:
    """Whether the first and the last block of a kind show the same."""
    shown: list[_Shown | None] = []
    for index in (numbers[0], numbers[-1]):
        try:
            with _trial(blocks[index], _calls_of(found, index), config) as trial:
                shown.append(_look(trial, trial.run(LONG), expert_counts(config)))
        except ModelError:
            shown.append(None)
    return shown[0] == shown[1]


def _facts(block: nn.Module, calls: Mapping[tuple[int, int], BlockCall], config: Any) -> BlockFacts:
    """What one block shows."""
    try:
        with _trial(block, calls, config) as trial:
            return _verified(trial, expert_counts(config))
    except ModelError as problem:
        return BlockFacts(problem=problem.message)


def _look(trial: Trial, long: Run, routers: frozenset[int]) -> _Shown:
    short = trial.run(SHORT)
    readers, again = find_readers(trial.block, long, routers), find_readers(trial.block, short, routers)
    if (readers.groups, readers.mixtures) != (again.groups, again.mixtures):
        raise ModelError("which Linears share an input depends on the text's length", "it needs an adapter of its own")
    producers = find_producers(trial, short, readers.groups, readers.loose)
    spaces = find_spaces(trial, long, readers.groups, producers, readers.loose)
    absorbers = [_absorber(trial, producers.get(index), space) for index, space in enumerate(spaces.groups)]
    return _Shown(readers, tuple(absorbers), spaces)


def _verified(trial: Trial, routers: frozenset[int]) -> BlockFacts:
    """The subsets of a block; those whose fold doesn't leave its output as it was have no ``prev``."""
    long = trial.run(LONG)
    shown = _look(trial, long, routers)
    subsets, reasons, heads = [], {}, None
    for group, space, found in zip(shown.readers.groups, shown.map.groups, shown.absorbers, strict=True):
        subset = Subset(
            linears=group.linears,
            prev=None,
            inspect=_inspect(trial, group),
            reads=space.reads,
            writes=space.writes,
            also=group.also,
            fused=_fused(group.linears),
            experts=group.experts,
        )
        problem: str | None
        if isinstance(found, Absorber):
            claimed = replace(subset, prev=found.prev, rows=found.rows, offset=found.offset)
            problem = fold_problem(trial, claimed, found.heads or Heads(1, 1, 1), long.output)
            if problem is None:
                subset, heads = claimed, heads or found.heads
            elif group.opaque:
                problem = f"{', '.join(group.opaque)} reads it too, and its experts aren't Linears"
        else:
            problem = found
        if problem is not None:
            reasons[subset.key] = problem
        subsets.append(subset)
    for path, place in reversed(list(shown.readers.mixtures.items())):
        subset, problem = subset_of_experts(trial, long, path, shown.map.experts[path])
        subsets.insert(place, subset)
        if problem is not None:
            reasons[subset.key] = problem
    return BlockFacts(tuple(_seen_behind(trial, subsets)), reasons, shown.readers.loose, heads=heads)


def _seen_behind(trial: Trial, subsets: Sequence[Subset]) -> list[Subset]:
    """The subsets, with a witness behind those that are one Linear which does the work of several: queries, keys and
    values, or a gate and what it's multiplied by. Where these are Linears of their own, what they make together is
    looked at."""
    several = {subset.prev for subset in subsets if subset.rows is not None}
    return [
        replace(one, inspect=_around(trial, list(one.linears)))
        if one.reads == "residual" and len(one.linears) == 1 and one.linears[0] in several
        else one
        for one in subsets
    ]


def _absorber(trial: Trial, producer: Producer | None, space: Spaces) -> Absorber | str:
    if producer is not None:
        return absorber_of(producer, trial.block.get_submodule(producer.name))
    if space.reads == "residual":
        return "it reads the residual itself, no norm with a weight stands in front"
    made_of = ", ".join(space.sources) or "what makes it"
    return f"{made_of}: something stands between that doesn't keep a scale, such as GELU or a norm"


def _inspect(trial: Trial, group: Group) -> str:
    """The smallest module, called once, that contains all readers."""
    names = [*group.linears, *group.also]
    return names[0] if len(names) == 1 else _around(trial, names)


def _around(trial: Trial, names: Sequence[str]) -> str:
    """The smallest module, called once, around these."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    above = [".".join(shared[:depth]) for depth in range(len(shared), 0, -1)]
    called = trial.run(LONG, above).seen if above else {}
    return next((name for name in above if name in called and len(called[name].outputs) == 1), "")


def _fused(linears: Sequence[str]) -> tuple[tuple[str, ...], ...] | None:
    """Those of one module, where the readers are of several: attention and feed-forward side by side."""
    by_parent: dict[str, list[str]] = {}
    for name in linears:
        by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    return tuple(map(tuple, by_parent.values())) if len(by_parent) > 1 else None
