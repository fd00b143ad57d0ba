"""How large the inputs of a block's Linears are, for formats that store it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ..algorithms import Online, new_statistics
from ..models import Subset
from ..quant import InputSquares
from .parts import solved_units, watched_modules
from .stages import BlockRun, Observed, Stage, run_together


def observe_squares(
    run: BlockRun, subsets: Sequence[Subset], online: Online, device: torch.device
) -> dict[str, InputSquares]:
    """Sums of squares by Linear, from one forward of the block as it is, whose inputs stay where they are."""
    found: dict[str, InputSquares] = {}

    units = solved_units(subsets)

    def note(position: int, observed: Sequence[Observed]) -> None:
        for one in observed:
            squares = one.statistics.sum_squares
            if squares is not None:
                own = InputSquares(squares.total.cpu(), squares.tokens)
                found.update(dict.fromkeys(units[position].parts[one.part].linears, own))

    stages = []
    for unit in units:
        linear = run.block.get_submodule(unit.subset.linears[0])
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{unit.subset.linears[0]} is a {type(linear).__name__}, not a Linear")
        make = partial(new_statistics, ("sum_squares",), linear.in_features, device, None)
        watched = watched_modules(run.block, unit)
        stages.append(Stage(watched, None, make, online.of_input(unit.subset), experts=unit.experts))
    run_together(run, stages, note, keep=False)
    return found
