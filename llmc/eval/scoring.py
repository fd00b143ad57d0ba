"""Log-likelihoods of continuations, from logits that come batch by batch and chunk by chunk.

Nothing here knows where logits come from: a whole model, or one that is streamed block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError

Visit = Callable[[int, int, Tensor], None]
"""Sees the logits ``[batch, tokens, vocabulary]`` of a batch (its number first) from a position on."""

Logits = Callable[[Sequence[Tensor], Visit], None]
"""Runs batches of token ids ``[batch, tokens]`` through a model, and lets every chunk of its logits be visited."""

LENGTH_STEP = 32
"""Batches are padded to multiples of it: a model keeps masks and positions for each length that it is given."""


@dataclass(frozen=True)
class Continuation:
    """What is scored: some tokens behind others.

    Attributes:
        inputs: what the model reads, everything but the last token.
        targets: the tokens to be expected at the last positions of ``inputs``.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], limit: int) -> Continuation:
        """A continuation of a context; too long a context loses its beginning.

        Args:
            context: at least one token.
            continuation: at least one token.
            limit: how many tokens the model can read.

        Raises:
            DataError: the continuation alone is longer than that.
        """
        if len(continuation) > limit:
            raise DataError(
                f"a task has an answer of {len(continuation)} tokens, and the model reads at most {limit}",
                "leave this task out, or evaluate a model with a longer context",
            )
        return cls((*context, *continuation)[-(limit + 1) :][:-1], tuple(continuation))

    @property
    def first(self) -> int:
        """The position whose logits are for the first target."""
        return len(self.inputs) - len(self.targets)


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is.

    Attributes:
        total: the sum of its tokens' log-probabilities, in nats.
        greedy: whether each token is the most likely one at its place.
    """

    total: float = 0.0
    greedy: bool = True

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(self.total + other.total, self.greedy and other.greedy)


def score(
    wanted: Collection[Continuation], logits: Logits, limit: int, *, batch_size: int, alone: bool = False
) -> dict[Continuation, Likelihood]:
    """Score continuations, each input read once, all in one go over the model.

    Batches are of inputs of similar length, padded on the right: a causal model's outputs don't depend on what follows.

    Args:
        wanted: the continuations.
        logits: the model.
        limit: how many tokens it can read.
        batch_size: the most inputs in a batch.
        alone: every input by itself, and unpadded, for models whose outputs depend on the rest of the batch.

    Returns:
        For each its likelihood: log-softmax in float32 of float32 logits, summed in float64.
    """
    by_input: dict[tuple[int, ...], list[Continuation]] = {}
    for one in dict.fromkeys(wanted):
        by_input.setdefault(one.inputs, []).append(one)
    rows = sorted(by_input, key=lambda inputs: (-len(inputs), inputs))
    size = 1 if alone else batch_size
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    found = dict.fromkeys(wanted, Likelihood())

    def visit(batch: int, start: int, chunk: Tensor) -> None:
        for row, inputs in zip(chunk, parts[batch], strict=True):
            for one in by_input[inputs]:
                found[one] += _part(one, row, start)

    logits([padded(part, limit, step=1 if alone else LENGTH_STEP) for part in parts], visit)
    return found


def _part(one: Continuation, row: Tensor, start: int) -> Likelihood:
    """The likelihood of those targets whose logits are in ``row``, ``[tokens, vocabulary]`` from ``start`` on."""
    low, high = max(one.first, start), min(len(one.inputs), start + len(row))
    if low >= high:
        return Likelihood()
    predicted = torch.log_softmax(row[low - start : high - start].float(), dim=-1)
    targets = torch.tensor(one.targets[low - one.first : high - one.first], device=row.device)
    chosen = predicted.gather(1, targets[:, None])
    return Likelihood(float(chosen.double().sum()), bool((predicted.argmax(dim=-1) == targets).all()))


def padded(rows: Sequence[Sequence[int]], limit: int, step: int = LENGTH_STEP) -> Tensor:
    """Token ids of different lengths as one batch, int64 ``[batch, tokens]``, filled up with zeros on the right.

    Its length is the next multiple of ``step``, or ``limit`` if that is less.
    """
    longest = max(map(len, rows))
    length = max(longest, min(limit, -(-longest // step) * step))
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
