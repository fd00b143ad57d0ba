"""What the engine is given besides the model, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from .batch import Batch


class Listener(Protocol):
    """Hears of a run's progress."""

    def started(self, blocks: int, done: int) -> None:
        """The pass begins with ``done`` of ``blocks`` blocks already written by an earlier run."""

    def block(self, index: int, row: Mapping[str, Any]) -> None:
        """Block ``index`` is finished (``row`` is its line in the journal)."""

    def phase(self, text: str) -> None:
        """What is going on now."""


@dataclass(frozen=True)
class Batches:
    """What the model is given, and its states that it is run through."""

    batches: Sequence[Batch]
    positions: frozenset[str] = frozenset()


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
    """What a pass measured.

    Attributes:
        losses: for each evaluated state, one ``[batch, tokens - 1]`` cross entropy per evaluation batch.
        decoded: the same of the batches that were decoded token by token.
        bytes_read: bytes of tensor data read from the checkpoint.
        seconds: time in this process by kind of work.
        peak_device: largest allocation on the device, bytes; 0 where that is the host.
    """

    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    decoded: dict[str, list[Tensor]] = field(default_factory=dict)
    bytes_read: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_device: int = 0
