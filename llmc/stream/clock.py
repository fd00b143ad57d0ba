"""What takes how much time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .memory import peak_host_memory

_T = TypeVar("_T")


class Clock:
    """Seconds by kind of work, and the device's memory, of a whole pass and of one block after the other.

    Args:
        device: where blocks are run.

    Attributes:
        spent: seconds of the pass by kind.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.spent: dict[str, float] = {}
        self._peak = 0
        self.begin()

    def timed(self, kind: str, work: Callable[[], _T]) -> _T:
        """Do some work of a kind; returns its result."""
        started = time.perf_counter()
        result = work()
        self.spent[kind] = self.spent.get(kind, 0.0) + time.perf_counter() - started
        return result

    def begin(self) -> None:
        """A block begins."""
        self._look()
        self._started, self._before = time.perf_counter(), dict(self.spent)

    def lap(self) -> dict[str, Any]:
        """What went into the block so far: wall time, the same by kind of work, and memory in bytes: the process's
        largest resident size until now, and the largest allocation on the device since the block began, or None."""
        since = {kind: spent - self._before.get(kind, 0.0) for kind, spent in self.spent.items()}
        return {
            "seconds": round(time.perf_counter() - self._started, 3),
            "seconds_by_kind": {kind: round(spent, 3) for kind, spent in since.items() if spent > 0},
            "memory": {"host": peak_host_memory(), "device": self._look()},
        }

    def finish(self) -> tuple[dict[str, float], int]:
        """Seconds of the pass by kind, and the largest allocation on the device, bytes; 0 where that is the host."""
        self._look()
        return self.spent, self._peak

    def _look(self) -> int | None:
        if self._device.type != "cuda":
            return None
        found = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._peak = max(self._peak, found)
        return found
