"""The choice of options is the best there is: against trying all, and against dynamic programming."""

from __future__ import annotations

import random
from itertools import product
from math import inf

import pytest

from llmc.budget.allocation import Option, allocate, smallest


def total(groups, choice, what) -> float:
    return sum(getattr(options[index], what) for options, index in zip(groups, choice, strict=True))


def best_of_all(groups, budget) -> float:
    choices = product(*(range(len(options)) for options in groups))
    fitting = [choice for choice in choices if total(groups, choice, "size") <= budget]
    return min(total(groups, choice, "loss") for choice in fitting)


def best_by_tables(groups, budget) -> float:
    """Least loss for each size, group by group."""
    least = [0.0] * (budget + 1)
    for options in groups:
        least = [
            min((least[room - one.size] + one.loss for one in options if one.size <= room), default=inf)
            for room in range(budget + 1)
        ]
    return least[budget]


def random_groups(seed: int, count: int, options: int, unit: int = 1, spread: float = 3.0):
    """Losses over many orders of magnitude, as those of layers are; some options are worse than others in both."""
    generator = random.Random(seed)
    return [
        [
            Option(10 ** generator.uniform(-spread, spread), unit * generator.randrange(1, 40))
            for _ in range(generator.randrange(1, options + 1))
        ]
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_that_fits_loses_less(seed):
    groups = random_groups(seed, count=6, options=4)
    low, high = smallest(groups), sum(max(one.size for one in options) for options in groups)
    for budget in {low, low + 1, (low + high) // 2, high, high + 5}:
        choice = allocate(groups, budget)
        assert total(groups, choice, "size") <= budget
        assert total(groups, choice, "loss") == pytest.approx(best_of_all(groups, budget), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_as_many_groups_as_a_model_has_against_dynamic_programming(seed):
    groups = random_groups(seed, count=120, options=6, spread=2.0)
    budget = smallest(groups) + 700
    choice = allocate(groups, budget)
    assert total(groups, choice, "size") <= budget
    assert total(groups, choice, "loss") == pytest.approx(best_by_tables(groups, budget), rel=1e-8)


def test_sizes_as_large_as_bits_of_a_large_model_are_kept_to_exactly():
    unit = 64 * 1024 * 53248
    groups = random_groups(1, count=40, options=5, unit=unit, spread=1.0)
    budget = smallest(groups) + 300 * unit - 1
    choice = allocate(groups, budget)
    small = [[Option(one.loss, one.size // unit) for one in options] for options in groups]
    assert total(groups, choice, "size") <= budget
    assert total(groups, choice, "loss") == pytest.approx(best_by_tables(small, budget // unit), rel=1e-8)


def test_equal_options_are_the_smaller_and_the_first():
    same = [Option(0.0, 8), Option(0.0, 4), Option(0.0, 4), Option(5.0, 2)]
    assert allocate([same, same], 100) == [1, 1]


def test_the_same_input_gives_the_same_choice_where_many_are_best():
    groups = [[Option(4.0, 2), Option(1.0, 3)]] * 30
    choices = [tuple(allocate(groups, 75)) for _ in range(3)]
    assert len(set(choices)) == 1
    assert sum(choices[0]) == 15


def test_losses_of_any_magnitude():
    for factor in (1e-30, 1e-6, 1e20):
        groups = [[Option(factor * loss, size) for loss, size in ((9, 1), (3, 2), (1, 3))] for _ in range(4)]
        assert total(groups, allocate(groups, 8), "loss") == pytest.approx(12 * factor)


def test_nothing_fits():
    with pytest.raises(ValueError, match="take 5, more than 4"):
        allocate([[Option(1.0, 2)], [Option(0.0, 3), Option(9.0, 7)]], 4)
    assert allocate([], 0) == []
