"""What stands in front of the blocks and behind them, as the transforms leave it that change weights at loading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..algorithms import Algorithm, Frame
from .skeleton import Skeleton


class Edges:
    """Embedding and head of the changed model, from those of the original.

    Args:
        algorithms: the transforms, in order.
        frame: what they may know of the model; None only if there is none of them.
        skeleton: knows the names.
        device: where to compute.

    Raises:
        ValueError: transforms without a frame.
    """

    def __init__(
        self, algorithms: tuple[Algorithm, ...], frame: Frame | None, skeleton: Skeleton, device: torch.device
    ) -> None:
        if algorithms and frame is None:
            raise ValueError("a transform at loading needs the model's frame")
        self._steps = [(algorithm, frame) for algorithm in algorithms if frame is not None]
        self._skeleton, self._device = skeleton, device

    @property
    def change(self) -> bool:
        """Whether the edges aren't simply the original's. Then a tied head gets weights of its own."""
        return bool(self._steps)

    def embedding(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """The changed tensors in front of the blocks by checkpoint name, in their stored dtypes."""
        return self._changed(raw, {}, lambda algorithm: algorithm.embedding)

    def head(self, raw: dict[str, Tensor], embedding: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The changed tensors behind the blocks; ``embedding`` holds the original tensors that the head shares."""
        shared = {self._skeleton.parameter_of[name]: tensor for name, tensor in embedding.items()}
        tied = {name: shared[source] for name, source in self._skeleton.tied().items() if source in shared}
        return self._changed(raw, tied, lambda algorithm: algorithm.head)

    def by_state(
        self, original: dict[str, Tensor], changed: dict[str, Tensor], streams: Iterable[str]
    ) -> list[tuple[dict[str, Tensor], list[str]]]:
        """Which weights go with which streams: only the evaluation of the original keeps the original's.

        The changed ones are there also without a stream: loading them shows whether their shapes fit.
        """
        names = list(streams)
        first = [name for name in names if self.change and name.endswith(".pretrain")]
        rest = [name for name in names if name not in first]
        return [*([(original, first)] if first else []), (changed, rest)]

    def hidden(self, hidden: Tensor) -> Tensor:
        """The changed model's hidden state, float32, given the original's between two blocks, both on the CPU."""
        if not self._steps:
            return hidden.float()
        changed = hidden.to(self._device).float()
        for algorithm, frame in self._steps:
            changed = algorithm.hidden(changed, frame)
        return changed.cpu()

    def _changed(
        self,
        raw: dict[str, Tensor],
        tied: Mapping[str, Tensor],
        method: Callable[[Algorithm], Callable[[Mapping[str, Tensor], Frame], dict[str, Tensor]]],
    ) -> dict[str, Tensor]:
        if not self._steps:
            return raw
        stored = {self._skeleton.parameter_of[name]: name for name in raw}
        weights = {self._skeleton.parameter_of[name]: tensor.to(self._device) for name, tensor in raw.items()}
        weights |= {name: tensor.to(self._device) for name, tensor in tied.items()}
        for algorithm, frame in self._steps:
            weights = method(algorithm)(weights, frame)
        return {stored.get(name, name): tensor.cpu() for name, tensor in weights.items()}
