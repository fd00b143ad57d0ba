"""How the model calls its blocks, learned from one dry forward of its own code, and its head run the same way.

Every block is replaced by a recorder that remembers its arguments and returns the hidden state unchanged. Blocks may be
called differently (sliding and full attention, several rope sets): the arguments are kept for each. Some models expect
a tensor of their blocks, others a tuple: a recorder's output is both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .skeleton import EMBED, Skeleton

_HEAD_TOKENS = 256  # logits are made for so many tokens at a time: a large vocabulary would fill the memory


@dataclass(frozen=True)
class Call:
    """Arguments of a block besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Run a block as the model would; ``hidden`` is ``[batch, tokens, hidden]``, so is the result."""
        output = block(hidden, *self.args, **self.kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        return hidden


class _LastBlock(Exception):
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


class _Recorder(nn.Module):
    """Stands in for a block; whatever else the model asks of it, the real block answers."""

    def __init__(self, real: nn.Module, returned: Tensor | None, *, last: bool) -> None:
        super().__init__()
        self.__dict__["real"] = real
        self.returned, self.last = None if returned is None else _Output.of(returned), last
        self.call: Call | None = None
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["real"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden = hidden_states.first if isinstance(hidden_states, _Output) else hidden_states
        self.call = Call(args, kwargs)
        if self.returned is not None:
            return self.returned
        if self.last:
            raise _LastBlock
        return _Output.of(self.hidden)


@contextmanager
def _recording(blocks: nn.ModuleList, returned: Tensor | None) -> Iterator[list[_Recorder]]:
    real = list(blocks)
    recorders = [_Recorder(block, returned, last=block is real[-1]) for block in real]
    try:
        for index, recorder in enumerate(recorders):
            blocks[index] = recorder
        yield recorders
    finally:
        for index, block in enumerate(real):
            blocks[index] = block


@dataclass(frozen=True)
class Recorded:
    """What a dry forward showed: the input of the first block and the call of each."""

    hidden: Tensor
    calls: list[Call]


def record(skeleton: Skeleton, tokens: Tensor) -> Recorded:
    """Run the model's own code around its blocks on ``tokens`` ``[batch, tokens]``.

    Raises:
        ModelError: code between two blocks changes the hidden state, which a pass over blocks would lose; or that isn't
            ``[batch, tokens, hidden]``.
    """
    with _recording(skeleton.blocks, None) as recorders, suppress(_LastBlock):
        skeleton.model(input_ids=tokens, use_cache=False)
    first = recorders[0].hidden
    if first is None:
        raise ModelError("the model never called its blocks", "the adapter's path of the blocks must be wrong")
    if first.shape[:-1] != tokens.shape:
        raise ModelError(
            f"the hidden state of {list(tokens.shape)} tokens is {list(first.shape)}, not [batch, tokens, hidden]",
            "this is older code of the model's authors: look for a checkpoint that comes with newer one",
        )
    for index, recorder in enumerate(recorders):
        if recorder.hidden is not first:
            raise ModelError(
                f"the model changes the hidden state in front of block {index}", "it needs an adapter of its own"
            )
    calls = [recorder.call for recorder in recorders if recorder.call is not None]
    return Recorded(first, calls)


def token_losses(skeleton: Skeleton, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy ``[batch, tokens - 1]`` in nats of each next token, in float32, from the last block's output.

    The model's own forward does it, with recorders that return the saved ``hidden`` ``[batch, tokens, hidden]``: final
    norm, soft-capping and un-embedding come out right for every architecture. What stands before the blocks is stubbed.
    """
    losses = []
    count = tokens.shape[1]
    for start in range(0, count - 1, _HEAD_TOKENS):
        stop = min(start + _HEAD_TOKENS, count - 1)
        part = hidden[:, start:stop]
        with _recording(skeleton.blocks, part), _stubbed(skeleton, part):
            logits = skeleton.model(input_ids=tokens[:, start:stop], use_cache=False).logits.float()
        target = tokens[:, start + 1 : stop + 1]
        losses.append(
            nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        )
    return torch.cat(losses, dim=1)


@contextmanager
def _stubbed(skeleton: Skeleton, returned: Tensor) -> Iterator[None]:
    stubbed: Sequence[nn.Module] = skeleton.modules_of(EMBED)
    for module in stubbed:
        module.forward = lambda *args, **kwargs: returned
    try:
        yield
    finally:
        for module in stubbed:
            del module.forward
