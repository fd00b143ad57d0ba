"""What the engine is given besides the model, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ..eval.measure import Watch
from .batch import Batch


class Listener(Protocol):
    """Hears of a run's progress."""

    def started(self, blocks: int, done: int) -> None:
        """The pass begins with ``done`` of ``blocks`` blocks already written by an earlier run."""

    def block(self, index: int, row: Mapping[str, Any]) -> None:
        """Block ``index`` is finished (``row`` is its line in the journal)."""

    def phase(self, text: str) -> None:
        """What is going on now."""


class Silent:
    """A listener that doesn't care."""

    def started(self, blocks: int, done: int) -> None:
        """Ignore."""

    def block(self, index: int, row: Mapping[str, Any]) -> None:
        """Ignore."""

    def phase(self, text: str) -> None:
        """Ignore."""


@dataclass(frozen=True)
class Batches:
    """What the model is given, and what is measured of it.

    Attributes:
        batches: the tokens.
        watches: the measures.
        last: whether they are shown the logits of each sequence's last token too, behind which the text ends.
    """

    batches: Sequence[Batch]
    watches: Sequence[Watch] = ()
    last: bool = False

    @property
    def states(self) -> frozenset[str]:
        """The states of the model that it is run through."""
        return frozenset[str]().union(*(watch.streams for watch in self.watches))


@dataclass(frozen=True)
class EngineOptions:
    """How to run, without influence on the result.

    Attributes:
        forward: ``staged`` holds all batches inside a block, ``replay`` repeats the block; ``auto`` decides by memory.
        checkpoint_every: blocks between two activation checkpoints.
    """

    forward: Literal["auto", "staged", "replay"] = "auto"
    checkpoint_every: int = 5


@dataclass
class Outcome:
    """What a pass cost.

    Attributes:
        bytes_read: bytes of tensor data read from the checkpoint.
        seconds: time in this process by kind of work.
        peak_device: largest allocation on the device, bytes; 0 where that is the host.
    """

    bytes_read: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_device: int = 0
