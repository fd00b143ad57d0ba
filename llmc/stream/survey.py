"""A pass over the original model in front of the one that compresses: what each block does to the hidden state.

It costs a second reading of the checkpoint, less the head. It's as streamed as the other: one block in memory, a line
in the journal for each, the stream saved every few blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .activations import ActivationStore
from .batch import Batch
from .entrance import Entrance
from .journal import Journal
from .memory import give_back_memory, short_collections
from .skeleton import EMBED, Skeleton, block_unit
from .source import BlockSource

_STREAM, _ROW, _SAVED = "survey", "surveyed", "survey activations"


class BlockStatistic(Protocol):
    """Something to know of a block from its inputs and outputs."""

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add tokens ``[batch, tokens, hidden]``."""
        ...

    @property
    def value(self) -> float:
        """The result."""
        ...


class Survey:
    """Measures every block of the original model on the calibration text.

    Args:
        skeleton: the empty model; it is empty again afterwards.
        source: its weights.
        batches: what the model is given.
        statistic: makes an empty statistic of a block.
        store: for the one stream; nothing else may be in it.
        journal: gets a row for each block.
        device: where blocks are run.
        checkpoint_every: blocks between two checkpoints of the stream.
        phase: hears what is going on.
    """

    def __init__(
        self,
        *,
        skeleton: Skeleton,
        source: BlockSource,
        batches: Sequence[Batch],
        statistic: Callable[[], BlockStatistic],
        store: ActivationStore,
        journal: Journal,
        device: torch.device,
        checkpoint_every: int,
        phase: Callable[[str], None],
    ) -> None:
        self._skeleton, self._source, self._batches, self._statistic = skeleton, source, batches, statistic
        self._store, self._journal, self._every, self._phase = store, journal, checkpoint_every, phase
        self._entrance = Entrance(skeleton, store, device)

    @torch.no_grad()
    def run(self) -> list[float]:
        """The statistic of every block: what the journal has, and the rest measured now.

        Raises:
            CheckpointError: a weight is missing, misshapen, NaN or infinite.
        """
        count = len(self._skeleton.blocks)
        if len(self._known()) < count:
            with short_collections():
                self._measure(count)
        known = self._known()
        return [known[index] for index in range(count)]

    def _known(self) -> dict[int, float]:
        return {row["block"]: row["value"] for row in self._journal.rows if row["kind"] == _ROW}

    def _measure(self, count: int) -> None:
        saved = self._journal.last(_SAVED)
        first = 0 if saved is None else int(saved["after"]) + 1
        self._source.prefetch(EMBED)
        self._source.prefetch(block_unit(first))
        self._load(EMBED)
        self._entrance.fill(_STREAM, self._batches, keep=saved is None)
        self._skeleton.release_unit(EMBED)
        if saved is not None:
            self._store.restore(saved["file"])
        for index in range(first, count):
            self._phase(f"survey of block {index + 1}/{count}")
            self._block(index, last=index + 1 == count)

    def _block(self, index: int, *, last: bool) -> None:
        if not last:
            self._source.prefetch(block_unit(index + 1))
        self._load(block_unit(index))
        statistic, run = self._statistic(), self._entrance.run(index, _STREAM, self._batches)
        for batch in range(len(run.inputs)):
            output = run.forward(batch)
            statistic.update(run.inputs.load(batch, run.device), output)
            run.inputs.store(batch, output)
        self._skeleton.release(run.block)
        del run
        give_back_memory()
        if index not in self._known():  # a resumed survey repeats what lies behind its last checkpoint
            self._journal.append({"kind": _ROW, "block": index, "value": statistic.value})
        if (index + 1) % self._every == 0 and not last:
            self._checkpoint(index)

    def _checkpoint(self, index: int) -> None:
        before, file = self._journal.last(_SAVED), f"survey-{index}.safetensors"
        self._store.save(file)
        self._journal.append({"kind": _SAVED, "after": index, "file": file})
        if before is not None and before["file"] != file:
            self._store.remove(before["file"])

    def _load(self, unit: str) -> None:
        self._skeleton.load(self._source.take(unit))
