"""What a measure of a model gets to see: logits, some tokens at a time, and what it says in the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

ORIGINAL = "pretrain"
"""The state of the model that others are compared with, as ``eval_pos`` calls it."""


@dataclass(frozen=True)
class Chunk:
    """Logits of some neighbouring tokens of a batch.

    Attributes:
        state: of the model (``pretrain`` is the original, ``fake_quant`` the compressed one).
        batch: number of the batch.
        start: of the first token in the batch.
        tokens: all token ids of the batch, int64 ``[batch, tokens]``.
        logits: float32 ``[batch, n, vocabulary]``, of the tokens ``start`` to ``start + n``.
        original: the same of the original model, for a measure that compares.
    """

    state: str
    batch: int
    start: int
    tokens: Tensor
    logits: Tensor
    original: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """The tokens that follow, ``[batch, n]``; one less where the batch ends."""
        first = self.start + 1
        return self.tokens[:, first : first + self.logits.shape[1]]


class Measure(Protocol):
    """Something to know of a model's states. What it keeps of a chunk is small: logits are gone when it returns."""

    @property
    def compares(self) -> bool:
        """Whether it needs the original's logits beside those of a state."""
        ...

    def see(self, chunk: Chunk) -> None:
        """Take a chunk in. They come batch by batch, and in each batch in the order of the tokens."""
        ...


@dataclass(frozen=True)
class Watch:
    """A measure, and what it looks at.

    Attributes:
        measure: gets the chunks.
        batches: numbers of the batches.
        states: of the model.
    """

    measure: Measure
    batches: range
    states: frozenset[str] = field(default_factory=frozenset)

    @property
    def streams(self) -> frozenset[str]:
        """The states that must be run for it."""
        return self.states | {ORIGINAL} if self.measure.compares and self.states else self.states


@dataclass(frozen=True)
class Text:
    """What was read, to say beside every number.

    Attributes:
        name: of the text (``wikitext2``).
        protocol: text, split, tokenization and windowing in words.
        tokens_sha256: digest of the token ids.
        windows: how many.
        seq_len: tokens in each.
    """

    name: str
    protocol: str
    tokens_sha256: str
    windows: int
    seq_len: int


class Evaluated(Protocol):
    """A result: what, on which text or task, of which model, and by which protocol."""

    @property
    def kind(self) -> str:
        """What ``eval.type`` calls it."""
        ...

    @property
    def name(self) -> str:
        """The text, or the task."""
        ...

    @property
    def position(self) -> str:
        """Which model, as ``eval_pos`` calls it."""
        ...

    @property
    def value(self) -> float:
        """The number that stands for it."""
        ...

    @property
    def protocol(self) -> str:
        """How it was measured, in words."""
        ...

    def details(self) -> str:
        """What a line about it says besides the value; or nothing."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``metrics.json``."""
        ...
