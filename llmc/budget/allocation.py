"""Which of several options each group of layers takes, such that all fit a budget and lose the least.

The multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, *Knapsack Problems*, chapter 11) as an integer
programme, solved exactly by HiGHS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array, csr_array


@dataclass(frozen=True)
class Option:
    """What a group of layers costs in a scheme.

    Attributes:
        loss: to be minimized in sum; finite, at least 0.
        size: whole number, such as bits.
    """

    loss: float
    size: int


def smallest(groups: Sequence[Sequence[Option]]) -> int:
    """The size where every group takes its smallest option."""
    return sum(min(option.size for option in options) for options in groups)


def allocate(groups: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of the option that each group takes: the least sum of losses among all whose sizes fit.

    The same input gives the same output. Of equal options of a group the smaller counts, then the first.

    Args:
        groups: the options of each.
        budget: most that the sizes may be in sum.

    Raises:
        ValueError: nothing fits.
    """
    if smallest(groups) > budget:
        raise ValueError(f"the smallest options take {smallest(groups)}, more than {budget}")
    if not groups:
        return []
    useful = [_useful(options) for options in groups]
    columns = [(row, index) for row, kept in enumerate(useful) for index in kept]
    losses = np.array([groups[row][index].loss for row, index in columns], dtype=np.float64)
    unit = math.gcd(*(groups[row][index].size for row, index in columns)) or 1
    sizes = np.array([groups[row][index].size // unit for row, index in columns], dtype=np.float64)
    rows = np.array([row for row, _ in columns])
    each = coo_array((np.ones(len(columns)), (rows, np.arange(len(columns)))), shape=(len(groups), len(columns)))
    limits = [
        LinearConstraint(csr_array(each), 1, 1),
        LinearConstraint(csr_array(sizes[None]), -np.inf, budget // unit),
    ]
    # HiGHS ends at an absolute gap of 1e-6, so the optimum is brought near 1000; the relaxation says where it is.
    relaxed = _solve(losses / max(losses.max(), 1e-300), limits, whole=False)
    bound = float(relaxed.fun) * float(losses.max())
    scale = 1000 / bound if bound > 0 else 1 / max(losses.max(), 1e-300)
    taken = _solve(losses * scale, limits, whole=True).x > 0.5
    chosen = {row: index for (row, index), on in zip(columns, taken, strict=True) if on}
    found = [chosen[row] for row in range(len(groups))]
    if sum(options[index].size for options, index in zip(groups, found, strict=True)) > budget:
        raise RuntimeError("the solver's choice is larger than the budget")
    return found


def _useful(options: Sequence[Option]) -> list[int]:
    """The indexes of those that no other beats or equals in both loss and size; of equal ones the first."""
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda one: (options[one].size, options[one].loss, one)):
        if not kept or options[index].loss < options[kept[-1]].loss:
            kept.append(index)
    return kept


def _solve(losses: np.ndarray, limits: list[LinearConstraint], *, whole: bool) -> OptimizeResult:
    result = milp(
        losses,
        constraints=limits,
        integrality=np.full(len(losses), int(whole)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if not result.success:
        raise RuntimeError(f"the integer programme wasn't solved: {result.message}")
    return result
