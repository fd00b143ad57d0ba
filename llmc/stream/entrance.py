"""What stands in front of the blocks: it makes the streams of their first inputs, and shows how they are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .activations import ActivationStore
from .batch import Batch
from .calls import Call, Recorded, record
from .skeleton import Skeleton
from .stages import BlockRun


class Entrance:
    """Runs the embedding, and puts blocks, streams and calls together.

    Args:
        skeleton: the model.
        store: the streams.
        device: where to compute.
    """

    def __init__(self, skeleton: Skeleton, store: ActivationStore, device: torch.device) -> None:
        self._skeleton, self._store, self._device = skeleton, store, device
        self._calls: dict[tuple[int, int] | Batch, list[Call]] = {}

    def fill(self, name: str, batches: Sequence[Batch], *, keep: bool) -> None:
        """Make a stream of the first block's inputs; the embedding (and what makes features of images) is loaded.

        Args:
            name: the stream's.
            batches: what the model is given.
            keep: store the inputs; otherwise only the calls are learned, for a stream that a file will fill.
        """
        width = self._skeleton.model.config.get_text_config().hidden_size
        stream = self._store.add(name, [(*batch.shape, width) for batch in batches], self._skeleton.model.dtype)
        for index, batch in enumerate(batches):
            recorded = record(self._skeleton, batch, self._device)
            self._learn(batch, recorded)
            if keep:
                stream.store(index, recorded.hidden)

    def _learn(self, batch: Batch, recorded: Recorded) -> None:
        """Keep the calls: one for all batches of text of a shape, and one for each batch with images, whose masks,
        positions and features are its own. Those are too many for the device."""
        key = _key(batch)
        if key not in self._calls:
            known: dict[int, Tensor] = {}
            calls = recorded.calls
            if batch.has_images:
                calls = [call.waiting(torch.device("cpu"), known) for call in calls]
            self._calls[key] = calls

    def run(
        self,
        index: int,
        name: str,
        batches: Sequence[Batch],
        attention: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> BlockRun:
        """Block ``index`` with the stream ``name`` of these batches."""
        calls = [self._calls[_key(batch)][index] for batch in batches]
        return BlockRun(self._skeleton.blocks[index], self._store.streams[name], calls, self._device, attention)


def _key(batch: Batch) -> tuple[int, int] | Batch:
    return batch if batch.has_images else batch.shape
