"""A block's calls for a method that learns: the compressed block on its inputs, the original's outputs as targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from .inputs import BlockInputs
from .stages import BlockRun


@dataclass(frozen=True)
class LearningCalls:
    """A ``BlockCalls``. The KV cache, if it's quantized, is in full precision here: its rounding has no gradient.

    Attributes:
        run: the block with its inputs.
        inputs: what rounds the Linears' inputs.
        targets: the original block's output for each batch.
    """

    run: BlockRun
    inputs: BlockInputs
    targets: Callable[[int], Tensor]

    def __len__(self) -> int:
        return len(self.run.inputs)

    def output(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Output with these weights and rounded inputs; differentiable where gradients are enabled."""

        def block(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return functional_call(self.run.block, dict(weights), (hidden, *args), kwargs)

        with self.inputs.rounding():
            return self.run.calls[batch](block, self.run.inputs.load(batch, self.run.device))

    def plain(self, batch: int) -> Tensor:
        """Output of the block as it is, nothing rounded."""
        return self.run.forward(batch)

    def target(self, batch: int) -> Tensor:
        """Output of the original model's block."""
        return self.targets(batch).to(self.run.device, non_blocking=True)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Within the context a GPU adds up gradients in the same order every time, as a CPU does anyway: a block that is
    learned again after an interruption comes out the same."""
    if device.type == "cpu":
        yield
        return
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # it costs time and changes nothing here
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
