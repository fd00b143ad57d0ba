"""What stands in front of the blocks: it makes the streams of their first inputs, and shows how they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .activations import ActivationStore, Stream
from .batch import Batch
from .calls import Call, Recorded, record
from .skeleton import Skeleton
from .stages import BlockRun

_Key = tuple[int, int] | tuple[str, Batch]

Finished = tuple[nn.ModuleList, Mapping[str, Stream]]
"""A list of an encoder's blocks with the streams behind it, by their names."""


class Entrance:
    """Runs the embedding, and puts blocks, streams and calls together.

    Args:
        skeleton: the model.
        store: the streams.
        device: where to compute.
        finished: lists of blocks in front of the skeleton's own, which needn't be run again.
    """

    def __init__(
        self, skeleton: Skeleton, store: ActivationStore, device: torch.device, finished: Sequence[Finished] = ()
    ) -> None:
        self._skeleton, self._store, self._device, self._finished = skeleton, store, device, finished
        self._calls: dict[_Key, list[Call]] = {}
        self._apart: set[str] = set()

    def fill(self, name: str, batches: Sequence[Batch], *, keep: bool, apart: bool = False) -> None:
        """Make a stream of the first block's inputs; the embedding (and what makes features of images) is loaded.

        Args:
            name: the stream's.
            batches: what the model is given.
            keep: store the inputs; otherwise only the calls are learned, for a stream that a file will fill.
            apart: whether features of images are other ones in this stream than elsewhere, and so are calls with them.
        """
        if apart:
            self._apart.add(name)
        stream = self._store.add(name, self._shapes(name, batches), self._skeleton.model.dtype)
        for index, batch in enumerate(batches):
            recorded = self._record(name, index, batch)
            self._learn(self._key(name, batch), batch, recorded)
            if keep:
                stream.store(index, recorded.hidden)

    def _shapes(self, name: str, batches: Sequence[Batch]) -> list[tuple[int, ...]]:
        """Those of a stream. How many patches an encoder makes of an image only its own code knows."""
        if self._skeleton.is_encoder:
            return [tuple(self._record(name, index, batch).hidden.shape) for index, batch in enumerate(batches)]
        width = self._skeleton.model.config.get_text_config().hidden_size
        return [(*batch.shape, width) for batch in batches]

    def _record(self, name: str, index: int, batch: Batch) -> Recorded:
        passed = [(blocks, streams[name].load(index, self._device)) for blocks, streams in self._finished]
        return record(self._skeleton, batch, self._device, passed)

    def _learn(self, key: _Key, batch: Batch, recorded: Recorded) -> None:
        """Keep the calls: one for all batches of text of a shape, and one for each batch with images, whose masks,
        positions and features are its own. Those are too many for the device."""
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
        calls = [self._calls[self._key(name, batch)][index] for batch in batches]
        return BlockRun(self._skeleton.blocks[index], self._store.streams[name], calls, self._device, attention)

    def _key(self, name: str, batch: Batch) -> _Key:
        if not batch.has_images:
            return batch.shape
        return (name if name in self._apart else "", batch)
