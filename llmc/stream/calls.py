"""How the model calls its blocks, learned from one dry forward of its own code, and its head run the same way.

Every block is replaced by a recorder that remembers its arguments and returns the hidden state unchanged. Blocks may be
called differently (sliding and full attention, several rope sets): the arguments are kept for each. Some models expect
a tensor of their blocks, others a tuple: a recorder's output is both.

Where a model adds features of an image to the hidden state between blocks, the recorders return zeros instead: what
reaches the next one then *is* what the model adds, and adding it to any other hidden state gives what the model would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .batch import Batch
from .skeleton import EMBED, HEAD, Skeleton


@dataclass(frozen=True)
class Call:
    """Arguments of a block besides the hidden state.

    Attributes:
        args: positional ones.
        kwargs: named ones.
        added: what the model adds to the hidden state in front of the block, ``[batch, tokens, hidden]``; or None.
        left_out: whether the model doesn't call the block at all: the hidden state passes by.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    added: Tensor | None = None
    left_out: bool = False

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Run a block as the model would; ``hidden`` is ``[batch, tokens, hidden]``, so is the result. Arguments may
        wait on another device."""
        hidden = hidden if self.added is None else hidden + self.added.to(hidden.device)
        if self.left_out:
            return hidden
        args, kwargs = _moved((self.args, self.kwargs), hidden.device, {})
        output = block(hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def waiting(self, device: torch.device, known: dict[int, Tensor]) -> Call:
        """The same with arguments on a device; ``known`` keeps those that several blocks share one."""
        args, kwargs, added = _moved((self.args, self.kwargs, self.added), device, known)
        return Call(args, kwargs, added, self.left_out)


def _moved(value: Any, device: torch.device, known: dict[int, Tensor]) -> Any:
    """Arguments with all their tensors on a device."""
    if isinstance(value, Tensor):
        return value if value.device == device else known.setdefault(id(value), value.to(device))
    if type(value) is dict:
        return {name: _moved(inner, device, known) for name, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(inner, device, known) for inner in value)
    return value


class _Behind(Exception):
    """Ends a dry forward behind the last block."""


class _Output(Tensor):
    """What a recorder returns: a tensor, and to a model that expects a tuple, one whose first element is that tensor.

    The element is the very tensor that ``of`` got. Every operation takes an output for what it is, a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    first: Tensor

    @classmethod
    def of(cls, hidden: Tensor) -> _Output:
        output = hidden.as_subclass(cls)
        output.first = hidden
        return output

    def __getitem__(self, index: Any) -> Tensor:
        return self.first if isinstance(index, int) and index == 0 else self.first[index]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.first, None))


class _Recorder:
    """What a block's forward is replaced by; the block itself stays where it is, with its hooks and attributes."""

    def __init__(self, returned: Tensor | None, *, last: bool, zeros: bool) -> None:
        self.returned = None if returned is None else _Output.of(returned)
        self.last, self.zeros = last, zeros
        self.call: Call | None = None
        self.hidden: Tensor | None = None
        self.passed: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden = hidden_states.first if isinstance(hidden_states, _Output) else hidden_states
        self.call = Call(args, kwargs)
        if self.returned is not None:
            return self.returned
        if self.last:
            raise _Behind
        self.passed = torch.zeros_like(self.hidden) if self.zeros else self.hidden
        return _Output.of(self.passed)


@contextmanager
def _recording(blocks: nn.ModuleList, returned: Tensor | None, *, zeros: bool = False) -> Iterator[list[_Recorder]]:
    recorders = [_Recorder(returned, last=block is blocks[-1], zeros=zeros) for block in blocks]
    with ExitStack() as stack:
        for block, recorder in zip(blocks, recorders, strict=True):
            stack.enter_context(_replaced([block], recorder.forward))
        yield recorders


@dataclass(frozen=True)
class Recorded:
    """What a dry forward showed: the input of the first block, of an encoder ``[.., patches, hidden]``, and the call of
    each."""

    hidden: Tensor
    calls: list[Call]


Passed = Sequence[tuple[nn.ModuleList, Tensor]]
"""Lists of blocks that a forward doesn't run, with the outputs that they are known to have."""


def record(skeleton: Skeleton, batch: Batch, device: torch.device, passed: Passed = ()) -> Recorded:
    """Run the model's own code around its blocks on a batch; the embedding's unit is loaded.

    Args:
        skeleton: the model.
        batch: what it's given.
        device: where to compute.
        passed: lists of blocks in front of the skeleton's own.

    Raises:
        ModelError: code between two blocks changes the hidden state in a way that a pass over blocks would lose, a
            block wasn't called that every forward must call, or the hidden state isn't ``[batch, tokens, hidden]``.
    """
    adds = batch.has_images and skeleton.images is not None and skeleton.images.between
    with ExitStack() as stack:
        stack.enter_context(suppress(_Behind))
        recorders = stack.enter_context(_recording(skeleton.blocks, None, zeros=adds))
        stack.enter_context(_ending(skeleton))
        for blocks, output in passed:
            stack.enter_context(_recording(blocks, output))
        skeleton.model(**batch.to(device, skeleton.model.dtype), use_cache=False)
    first = next((recorder.hidden for recorder in recorders if recorder.hidden is not None), None)
    if first is None:
        raise ModelError("the model never called its blocks", "the adapter's path of the blocks must be wrong")
    if not skeleton.is_encoder and first.shape[:-1] != batch.tokens.shape:
        shape = list(batch.tokens.shape)
        raise ModelError(
            f"the hidden state of {shape} tokens is {list(first.shape)}, not [batch, tokens, hidden]",
            "this is older code of the model's authors: look for a checkpoint that comes with newer one",
        )
    calls, expected = [], first
    for index, recorder in enumerate(recorders):
        calls.append(_call_of(skeleton, index, recorder, expected, adds=adds))
        expected = expected if recorder.passed is None else recorder.passed
    return Recorded(first, calls)


def _call_of(skeleton: Skeleton, index: int, recorder: _Recorder, expected: Tensor, *, adds: bool) -> Call:
    """What a recorder saw of its block; ``expected`` is what the one before it returned."""
    if recorder.call is None or recorder.hidden is None:
        if skeleton.images is not None and skeleton.images.may_skip(skeleton.blocks[index]):
            return Call(left_out=True)
        raise ModelError(f"the model doesn't call block {index}", "it needs an adapter of its own")
    if recorder.hidden is expected:
        return recorder.call
    if adds:
        return replace(recorder.call, added=recorder.hidden)
    raise ModelError(f"the model changes the hidden state in front of block {index}", "it needs an adapter of its own")


def head_logits(skeleton: Skeleton, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Logits ``[batch, n, vocabulary]`` in float32 of some tokens, from the last block's output.

    The model's own forward does it, with recorders that return the saved ``hidden`` ``[batch, n, hidden]``: final
    norm, soft-capping and un-embedding come out right for every architecture. What stands before the blocks is stubbed.
    Differentiable where gradients are enabled.

    Args:
        skeleton: the model, its head loaded.
        hidden: of these tokens.
        tokens: their ids, ``[batch, n]``.
    """
    with _recording(skeleton.blocks, hidden), _stubbed(skeleton, hidden):
        logits: Tensor = skeleton.model(input_ids=tokens, use_cache=False).logits
    return logits.float()


def _stubbed(skeleton: Skeleton, returned: Tensor) -> AbstractContextManager[None]:
    """Within the context whatever stands in front of the blocks returns the hidden state."""
    return _replaced(skeleton.modules_of(EMBED), lambda *args, **kwargs: returned)


def _ending(skeleton: Skeleton) -> AbstractContextManager[None]:
    """Within the context a forward ends behind the blocks, also one that leaves out the last of them."""

    def end(*args: Any, **kwargs: Any) -> None:
        raise _Behind

    return _replaced(skeleton.modules_of(HEAD), end)


@contextmanager
def _replaced(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward
