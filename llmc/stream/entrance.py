"""What stands in front of the blocks: it makes the streams of their first inputs, and shows how they are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .activations import ActivationStore
from .calls import Call, record
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
        self._calls: dict[tuple[int, ...], list[Call]] = {}

    def fill(self, name: str, batches: Sequence[Tensor], *, keep: bool) -> None:
        """Make a stream of the first block's inputs for tokens ``[batch, tokens]``; the embedding is loaded.

        Args:
            name: the stream's.
            batches: the tokens.
            keep: store the inputs; otherwise only the calls are learned, for a stream that a file will fill.
        """
        width = self._skeleton.model.config.get_text_config().hidden_size
        shapes = [(tokens.shape[0], tokens.shape[1], width) for tokens in batches]
        stream = self._store.add(name, shapes, self._skeleton.model.dtype)
        for index, tokens in enumerate(batches):
            recorded = record(self._skeleton, tokens.to(self._device))
            self._calls.setdefault(tuple(tokens.shape), recorded.calls)
            if keep:
                stream.store(index, recorded.hidden)

    def run(
        self,
        index: int,
        name: str,
        batches: Sequence[Tensor],
        attention: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> BlockRun:
        """Block ``index`` with the stream ``name`` of these batches."""
        calls = [self._calls[tuple(tokens.shape)][index] for tokens in batches]
        return BlockRun(self._skeleton.blocks[index], self._store.streams[name], calls, self._device, attention)
