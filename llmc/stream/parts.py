"""Which of a block's Linears are looked at together, and where their inputs are seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ..models import Subset
from ..models.experts import LinearExperts
from ..models.mixture import in_solving_order, split


@dataclass(frozen=True)
class Unit:
    """A subset with the parts that a step is shown on their own.

    Attributes:
        subset: the whole.
        parts: itself, or each expert's share.
        experts: the expert of each part; empty where there is one part, which reads the whole input.
    """

    subset: Subset
    parts: tuple[Subset, ...]
    experts: tuple[int, ...] = ()


def transformed_units(subsets: Iterable[Subset]) -> list[Unit]:
    """What a transform is shown: what one norm feeds is whole, while each expert's last Linear is on its own."""
    return [_split(one) if "*" in one.inspect else Unit(one, (one,)) for one in subsets]


def solved_units(subsets: Sequence[Subset]) -> list[Unit]:
    """What a pruner or quantizer is shown: each expert on its own, with its own tokens."""
    return [Unit(one, (one,)) if one.experts is None else _split(one) for one in in_solving_order(subsets)]


def _split(subset: Subset) -> Unit:
    path = f"{subset.experts}."
    parts = split(subset)
    return Unit(subset, parts, tuple(int(part.linears[0].removeprefix(path).partition(".")[0]) for part in parts))


def watched_modules(block: nn.Module, unit: Unit) -> tuple[nn.Module, ...]:
    """The modules that are called with a unit's input, any of which may come first."""
    subset = unit.subset
    if subset.experts is None:
        return tuple(map(block.get_submodule, subset.linears))
    if not unit.experts:
        return (block.get_submodule(subset.inspect),)
    experts = block.get_submodule(subset.experts)
    if not isinstance(experts, LinearExperts):
        raise TypeError(f"{subset.experts} is a {type(experts).__name__}, not Linears")
    return (experts.between if subset.reads == "ffn" else experts.entrance,)
