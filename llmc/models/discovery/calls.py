"""Finds a model's blocks, how it calls them, and what it runs behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from .exact import Exact, fill

# Sequences and tokens. With a single token attention passes its value on; there are so many that no channel behind a
# ReLU is 0 in all of them.
SHORT, LONG = (64, 1), (2, 6)
_REMEDY = "write an adapter: docs/adding.md says how"
_LARGE = 2**22
_WRAPS: tuple[Callable[[Tensor], Any], ...] = (lambda h: h, lambda h: (h,), lambda h: (h, None))
_COUNTS = ("num_hidden_layers", "num_layers")  # ChatGLM's own code says the latter


@dataclass(frozen=True)
class BlockCall:
    """Arguments of a block besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A model's blocks.

    Attributes:
        path: of their list inside the model.
        head: names of the modules with parameters that run behind the last block only, in their order.
        calls: for a batch's shape, the call of each block.
        problem: why a pass over the blocks alone would lose something; None: it doesn't.
    """

    path: str
    head: tuple[str, ...]
    calls: Mapping[tuple[int, int], Sequence[BlockCall]]
    problem: str | None


def find_blocks(model: nn.Module, config: Any) -> Found:
    """Find the outermost list of as many members as the configuration has layers, each of which is called once.

    Args:
        model: a causal language model, parameters on the meta device; those outside of the blocks get random values.
        config: its text configuration.

    Raises:
        ModelError: there is none, or the model's code doesn't run.
    """
    count = next((n for name in _COUNTS if (n := getattr(config, name, None)) is not None), None)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ModelError(
            f"no blocks were found in {type(model).__name__}: it has no list of {count} modules, as many as "
            "its configuration says",
            _REMEDY,
        )
    failure: Exception | None = None
    for path, blocks in lists:
        try:
            return _look(model, path, blocks, config.vocab_size)
        except Exception as problem:  # a model's own code may fail in any way where a list isn't that of its blocks
            failure = failure or problem
    if isinstance(failure, ModelError):
        raise failure
    raise ModelError(
        f"no blocks were found in {type(model).__name__}: its code can't be run on random weights "
        f"({type(failure).__name__}: {failure})",
        _REMEDY,
    ) from failure


def _look(model: nn.Module, path: str, blocks: nn.ModuleList, vocabulary: int) -> Found:
    inside = {id(part) for part in blocks.modules()}
    outside = {name: part for name, part in model.named_modules() if id(part) not in inside}
    for name, part in outside.items():
        own = any(parameter is not None for parameter in part._parameters.values())
        if own and next(part.parameters()).is_meta:
            fill(_Bare(part), name)
    generator = torch.Generator().manual_seed(0)

    def tokens(shape: tuple[int, int]) -> Tensor:
        return torch.randint(vocabulary, shape, generator=generator)

    runs = {shape: _dry_run(model, path, blocks, outside, tokens(shape)) for shape in (SHORT, LONG)}
    other = _dry_run(model, path, blocks, outside, tokens(LONG))
    problem = runs[LONG].problem or _token_dependent(runs[LONG].calls, other.calls)
    return Found(path, runs[LONG].head, {shape: run.calls for shape, run in runs.items()}, problem)


class _Bare(nn.Module):
    """A module's own parameters, without those of its children."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self._parameters = real._parameters


@dataclass
class _DryRun:
    calls: list[BlockCall] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    problem: str | None = None

    @property
    def head(self) -> tuple[str, ...]:
        return tuple(name for name in dict.fromkeys(self.behind) if name not in self.before)


@torch.no_grad()
def _dry_run(
    model: nn.Module, path: str, blocks: nn.ModuleList, outside: Mapping[str, nn.Module], tokens: Tensor
) -> _DryRun:
    """Run the model's own code with blocks that return their input: as it is, or, for models that want that, as the
    first of a tuple of one or two."""
    whole: _DryRun | None = None
    ended, failure = False, None
    for wrap in _WRAPS:
        run = _DryRun()
        try:
            with _stand_ins(run, blocks, outside, wrap), Exact():
                model(input_ids=tokens, use_cache=False)
        except Exception as problem:  # a model's own code may fail in any way; which way is told below
            failure = failure or problem
            continue
        ended = True
        run.problem = _between(run)
        if run.order == list(range(len(blocks))):
            whole = whole or run
            if run.problem is None:
                return run
    if whole is not None:
        return whole
    if failure is not None and not ended:
        raise failure
    raise ModelError(
        f"no blocks were found in {type(model).__name__}: {path} has as many members as there are layers, but they "
        "aren't called once each, one after the other",
        _REMEDY,
    )


def _between(run: _DryRun) -> str | None:
    """Whether a tensor that enters a block isn't the one that the block before returned."""
    for index, hidden in enumerate(run.hidden):
        if hidden is not run.hidden[0]:
            return f"the model changes the hidden state in front of block {index}"
    if run.hidden and run.hidden[0].dim() != 3:
        return f"the hidden state has {run.hidden[0].dim()} dimensions, not [batch, tokens, hidden]"
    return None


@contextmanager
def _stand_ins(
    run: _DryRun, blocks: nn.ModuleList, outside: Mapping[str, nn.Module], wrap: Callable[[Tensor], Any]
) -> Iterator[None]:
    def stand_in(index: int) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            run.order.append(index)
            run.hidden.append(hidden_states)
            run.calls.append(BlockCall(args, kwargs))
            return wrap(hidden_states)

        return forward

    def noting(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if len(run.calls) in (0, len(blocks)):
                (run.behind if run.calls else run.before).append(name)

        return hook

    hooks = []
    stubbed: list[nn.Module] = []
    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)
            stubbed.append(block)
        for name, part in outside.items():
            if any(parameter is not None for parameter in part._parameters.values()):
                hooks.append(part.register_forward_pre_hook(noting(name)))
            if isinstance(part, nn.Linear) and part.weight.numel() > _LARGE:
                setattr(part, "forward", _zeros(part.out_features))  # noqa: B010
                stubbed.append(part)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for part in stubbed:
            del part.forward


def _zeros(width: int) -> Callable[[Tensor], Tensor]:
    """A large un-embedding would take its memory twice only to be thrown away."""
    return lambda inputs: inputs.new_zeros(*inputs.shape[:-1], width)


def _token_dependent(one: Sequence[BlockCall], other: Sequence[BlockCall]) -> str | None:
    """Whether a block gets more of the text than the hidden state: the streams between blocks hold nothing else."""
    for index, (first, second) in enumerate(zip(one, other, strict=True)):
        names = [f"argument {position + 1}" for position in range(len(first.args))] + list(first.kwargs)
        values = zip((*first.args, *first.kwargs.values()), (*second.args, *second.kwargs.values()), strict=True)
        for name, (a, b) in zip(names, values, strict=True):
            if not same_values(a, b):
                return f"block {index} gets something besides the hidden state that depends on the text ({name})"
    return None


def same_values(one: Any, other: Any) -> bool:
    """Whether two arguments hold the same tensors; what holds none is the same."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping) and list(one) == list(other) and all(same_values(one[k], other[k]) for k in one)
        )
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same_values, one, other))
    return True
