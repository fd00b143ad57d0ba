"""What is behind the blocks: logits of every state, some tokens at a time, for whoever measures something of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..eval.measure import ORIGINAL, Chunk
from .activations import ActivationStore
from .batch import Batch
from .calls import head_logits
from .edges import Edges
from .options import Batches
from .skeleton import Skeleton

_HEAD_TOKENS = 256  # logits are made for so many tokens at a time: a large vocabulary would fill the memory

_Placed = list[tuple[nn.Module, str, nn.Parameter]]


class Head:
    """Runs the head on the streams behind the last block.

    The original's head and that of a model which was changed at loading differ. A measure may compare both models'
    logits of the same tokens, so both heads' weights are held, and the modules get those of the one that is run.

    Args:
        skeleton: the model, its blocks empty.
        edges: know which weights go with which stream.
        store: the streams.
        device: where to compute.
    """

    def __init__(self, skeleton: Skeleton, edges: Edges, store: ActivationStore, device: torch.device) -> None:
        self._skeleton, self._edges, self._store, self._device = skeleton, edges, store, device
        self._of: dict[str, _Placed] = {}

    def show(
        self,
        raw: dict[str, Tensor],
        changed: dict[str, Tensor],
        embedding: Mapping[str, Tensor],
        texts: Mapping[str, Batches],
    ) -> None:
        """Show the logits to every measure.

        Args:
            raw: the original's tensors of the head by checkpoint name.
            changed: those of the changed model; the same object where nothing is changed.
            embedding: the original's tensors that its head shares; empty if it shares none.
            texts: what was read, by the kind of stream.
        """
        streams = [f"{kind}.{state}" for kind, read in texts.items() for state in sorted(read.states)]
        for weights, names in self._edges.by_state(raw, changed, streams):
            placed = self._load(weights, embedding if weights is raw else {})
            self._of |= dict.fromkeys(names, placed)
        for kind, read in texts.items():
            for index, batch in enumerate(read.batches):
                self._batch(kind, index, batch, read)
        for placed in self._of.values():
            _empty(placed)
        self._of.clear()

    def _load(self, weights: Mapping[str, Tensor], tied: Mapping[str, Tensor]) -> _Placed:
        """Load a head; its parameters, with which the modules are left empty again."""
        self._skeleton.load({**weights, **tied})
        if tied:
            self._skeleton.tie()
        placed = [
            (module, name, parameter)
            for module in self._skeleton.model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and not parameter.is_meta
        ]
        _empty(placed)
        return placed

    def _batch(self, kind: str, index: int, batch: Batch, read: Batches) -> None:
        watches = [watch for watch in read.watches if index in watch.batches]
        states = frozenset[str]().union(*(watch.streams for watch in watches))
        in_order = sorted(states, key=lambda state: (state != ORIGINAL, state))  # others are compared with it
        hidden = {state: self._store.streams[f"{kind}.{state}"].load(index, self._device) for state in in_order}
        tokens = batch.tokens.to(self._device)
        end = tokens.shape[1] - (not read.last)
        compares = any(watch.measure.compares for watch in watches)
        for start in range(0, end, _HEAD_TOKENS):
            part, original = slice(start, min(start + _HEAD_TOKENS, end)), None
            for state in in_order:
                logits = self._logits(f"{kind}.{state}", hidden[state][:, part], tokens[:, part])
                if compares and state == ORIGINAL:
                    original = logits
                for watch in watches:
                    if state in watch.states:
                        seen = original if watch.measure.compares else None
                        watch.measure.see(Chunk(state, index, start, tokens, logits, seen))
                del logits

    def _logits(self, stream: str, hidden: Tensor, tokens: Tensor) -> Tensor:
        for module, name, parameter in self._of[stream]:
            module._parameters[name] = parameter
        return head_logits(self._skeleton, hidden, tokens)


def _empty(placed: _Placed) -> None:
    """Take the parameters away from their modules."""
    for module, name, parameter in placed:
        module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
