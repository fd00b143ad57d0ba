"""The descent: two learning rates, the best epoch, never worse than the start, and what isn't finite ends it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmc.algorithms.fit import Group, fit


def leaf(*values: float) -> Tensor:
    return torch.tensor(values).requires_grad_()


def scripted(parameter: Tensor, losses: list[float]) -> Callable[[int], Tensor]:
    """A loss that says what it is told, call after call, and always points downwards."""
    told = iter(losses)
    return lambda batch: next(told) + (parameter - parameter.detach()).sum()


def test_each_group_moves_by_its_own_rate():
    """AdamW's first step is the rate, in the direction of the gradient's sign, whatever the gradient's size."""
    slow, fast = leaf(1.0, 1.0), leaf(1.0)
    note = fit(
        [Group([slow], 0.005), Group([fast], 0.01), Group([], 1.0)],
        lambda batch: (7 * slow[0] - 0.1 * slow[1] + 3 * fast).sum() + 10,
        1,
        epochs=1,
        weight_decay=0.0,
    )
    torch.testing.assert_close(slow.detach(), torch.tensor([0.995, 1.0]) + torch.tensor([0.0, 0.005]))
    torch.testing.assert_close(fast.detach(), torch.tensor([0.99]))
    assert note.epoch == 1 and note.end < note.start


def test_weight_decay_is_decoupled():
    parameter = leaf(2.0)
    fit([Group([parameter], 0.1)], lambda batch: parameter.sum(), 1, epochs=1, weight_decay=0.5)
    torch.testing.assert_close(parameter.detach(), torch.tensor([2.0 * (1 - 0.1 * 0.5) - 0.1]))


def test_it_finds_a_minimum_over_all_batches():
    parameter, wanted = leaf(0.0), [1.0, 2.0, 6.0]
    note = fit(
        [Group([parameter], 0.05)], lambda b: (parameter - wanted[b]).square().sum(), 3, epochs=200, weight_decay=0
    )
    assert float(parameter.detach()) == pytest.approx(3.0, abs=0.1)
    assert note.start == pytest.approx((1 + 4 + 36) / 3) and note.end == pytest.approx((4 + 1 + 9) / 3, abs=0.05)


def test_the_best_epoch_is_kept():
    parameter = leaf(1.0)
    loss = scripted(
        parameter, [10, 10, *(5, 5), *(1, 1), *(3, 3), 1, 2]
    )  # start, three epochs of two batches, the best
    note = fit([Group([parameter], 0.01)], loss, 2, epochs=3, weight_decay=0.0)
    torch.testing.assert_close(parameter.detach(), torch.tensor([1 - 4 * 0.01]))
    assert (note.start, note.end, note.epoch, note.stopped) == (10, 1.5, 2, None)


@pytest.mark.parametrize("end", [10.0, 12.0, math.nan])
def test_nothing_better_than_the_start_is_the_start(end):
    parameter = leaf(1.0)
    note = fit([Group([parameter], 0.01)], scripted(parameter, [10, 9, end]), 1, epochs=1, weight_decay=0.0)
    assert float(parameter.detach()) == 1 and (note.start, note.end, note.epoch) == (10, 10, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_isnt_finite_ends_it_with_the_best_epoch_before(bad):
    parameter = leaf(1.0)
    note = fit([Group([parameter], 0.01)], scripted(parameter, [10, 5, 4, bad, 4]), 1, epochs=9, weight_decay=0.0)
    torch.testing.assert_close(parameter.detach(), torch.tensor([1 - 2 * 0.01]))
    assert note.epoch == 2 and note.stopped == "the loss of batch 0 in epoch 3 isn't finite"


def test_a_loss_that_is_never_finite_leaves_the_start():
    parameter = leaf(1.0)
    note = fit([Group([parameter], 0.01)], lambda batch: parameter.sum() * math.nan, 1, epochs=2, weight_decay=0.0)
    assert float(parameter.detach()) == 1 and note.epoch == 0 and note.stopped is not None


def test_a_parameter_that_isnt_finite_ends_it_too():
    """The loss is finite, its gradient isn't: the epoch that ends with such parameters doesn't count."""
    parameter, calls = leaf(1.0), iter(range(100))

    def loss(batch: int) -> Tensor:
        late = next(calls) == 2  # the start, the first epoch, then
        return parameter.sum() + (torch.sqrt(parameter - parameter.detach()).sum() if late else 0)

    note = fit([Group([parameter], 0.01)], loss, 1, epochs=5, weight_decay=0.0)
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.99]))
    assert note.epoch == 1 and note.stopped == "a parameter isn't finite behind epoch 2"


def test_what_is_bounded_stays_so():
    parameter = leaf(0.001, 0.5)
    fit([Group([parameter], 0.1, lowest=0.01)], lambda batch: parameter.sum(), 1, epochs=3, weight_decay=0.0)
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.01, 0.2]))


def test_without_parameters_there_is_nothing_to_do():
    note = fit([Group([], 0.1)], lambda batch: torch.tensor(3.0), 2, epochs=3, weight_decay=0.0)
    assert (note.start, note.end, note.epoch) == (3, 3, 0)
