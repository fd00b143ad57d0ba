"""How large the inputs of a block's Linears are, for formats that store it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ..algorithms import Online, Statistics, new_statistics
from ..models import Subset
from ..quant import InputSquares
from .stages import BlockRun, HeldCalls, Stage, run_together


def observe_squares(
    run: BlockRun, subsets: Sequence[Subset], online: Online, device: torch.device
) -> dict[str, InputSquares]:
    """Sums of squares by Linear, from one forward of the block as it is, whose inputs stay where they are."""
    found: dict[str, InputSquares] = {}

    def note(position: int, statistics: Statistics, calls: HeldCalls) -> None:
        squares = statistics.sum_squares
        if squares is not None:
            one = InputSquares(squares.total.cpu(), squares.tokens)
            found.update(dict.fromkeys(subsets[position].linears, one))

    stages = []
    for subset in subsets:
        linear = run.block.get_submodule(subset.linears[0])
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{subset.linears[0]} is a {type(linear).__name__}, not a Linear")
        make = partial(new_statistics, ("sum_squares",), linear.in_features, device, None)
        stages.append(Stage((linear,), None, make, online.of_input(subset)))
    run_together(run, stages, note, keep=False)
    return found
