"""Learning a block's few parameters by gradient descent over its calibration batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .views import TuneNote


@dataclass(frozen=True)
class Group:
    """Parameters (float32 leaves, changed in place) that share a learning rate. None goes below ``lowest``."""

    parameters: Sequence[Tensor]
    rate: float
    lowest: float | None = None

    def bound(self) -> None:
        """Raise what is too low."""
        if self.lowest is not None:
            for parameter in self.parameters:
                parameter.data.clamp_(min=self.lowest)


def fit(
    groups: Sequence[Group], loss: Callable[[int], Tensor], batches: int, *, epochs: int, weight_decay: float
) -> TuneNote:
    """AdamW over the batches in their order, one step a batch. Leaves in the parameters the best that was found.

    An epoch's loss is the mean over its steps. The epoch with the lowest is compared with the start, both with fixed
    parameters over all batches, and the better one kept: what is learned is never worse than what it began with. If a
    loss or a parameter stops being finite, learning ends and the best epoch before counts.

    Args:
        groups: what is learned.
        loss: of a batch, a differentiable scalar.
        batches: how many there are.
        epochs: passes over them.
        weight_decay: AdamW's.
    """
    parameters = [parameter for group in groups for parameter in group.parameters]
    for group in groups:
        group.bound()
    start = _mean_loss(loss, batches)
    if not parameters:
        return TuneNote(start, start, 0)
    initial = [parameter.detach().clone() for parameter in parameters]
    found = _descend(groups, loss, batches, epochs, weight_decay)
    if found.best is not None:
        _restore(parameters, found.best)
        end = _mean_loss(loss, batches)
        if end < start:
            return TuneNote(start, end, found.epoch, found.stopped)
    _restore(parameters, initial)
    return TuneNote(start, start, 0, found.stopped)


@dataclass
class _Found:
    """The best epoch so far, by the mean loss of its steps."""

    best: list[Tensor] | None = None
    epoch: int = 0
    loss: float = float("inf")
    stopped: str | None = None


def _descend(
    groups: Sequence[Group], loss: Callable[[int], Tensor], batches: int, epochs: int, weight_decay: float
) -> _Found:
    parameters = [parameter for group in groups for parameter in group.parameters]
    settings = [{"params": list(group.parameters), "lr": group.rate} for group in groups if group.parameters]
    optimizer = torch.optim.AdamW(settings, weight_decay=weight_decay)
    found = _Found()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in range(batches):
            with torch.enable_grad():
                value = loss(batch)
                gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            total += float(value.detach())
            if not math.isfinite(total):
                found.stopped = f"the loss of batch {batch} in epoch {epoch} isn't finite"
                return found
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            for group in groups:
                group.bound()
        if not all(parameter.isfinite().all() for parameter in parameters):
            found.stopped = f"a parameter isn't finite behind epoch {epoch}"
            return found
        if total < found.loss:
            found.loss, found.epoch = total, epoch
            found.best = [parameter.detach().clone() for parameter in parameters]
    return found


def _mean_loss(loss: Callable[[int], Tensor], batches: int) -> float:
    with torch.no_grad():
        return sum(float(loss(batch)) for batch in range(batches)) / batches


def _restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
