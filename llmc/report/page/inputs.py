"""What the inputs of the layers look like before and after the transforms: kurtosis, and channels that stick out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .chart import Chart, Line, Scale, line_chart
from .data import BlockRow, Spread
from .words import MISSING, number, percent

_MOST = 40  # rows of the table of outliers
_MOST_WORST = 4  # channels of one row


@dataclass(frozen=True)
class OutlierRow:
    """The outlier channels of one input: how many, how much of the energy, and the worst; before and after."""

    block: int
    name: str
    before: str
    after: str
    share_before: str
    share_after: str
    worst: str


@dataclass(frozen=True)
class Outliers:
    """The inputs with the largest outliers, and how many inputs have any."""

    rows: tuple[OutlierRow, ...]
    inputs: int
    transformed: bool


def short(key: str) -> str:
    """``mlp: gate_proj, up_proj`` of ``mlp.gate_proj+mlp.up_proj``."""
    names = key.split("+")
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) > 1:
        return ", ".join(names)
    leaves = ", ".join(name.rpartition(".")[2] for name in names)
    parent = next(iter(parents))
    return f"{parent}: {leaves}" if parent else leaves


def keys_of(blocks: Sequence[BlockRow]) -> list[str]:
    """All subsets' keys, in their order."""
    return list(dict.fromkeys(key for block in blocks for key in block.inputs))


def kurtosis_charts(blocks: Sequence[BlockRow]) -> list[Chart]:
    """A chart for each subset's input, original against transformed, all with one scale."""
    numbers = [block.number for block in blocks]
    lines = {key: _lines(blocks, key, lambda spread: spread.kurtosis) for key in keys_of(blocks)}
    values = [value for own in lines.values() for line in own for value in line.values if value is not None]
    if not values:
        return []
    scale = Scale.over(values, log=True)
    charts = (line_chart(short(key), numbers, own, axis="kurtosis", scale=scale) for key, own in lines.items())
    return [chart for chart in charts if chart is not None]


def _lines(blocks: Sequence[BlockRow], key: str, get: Callable[[Spread], float | None]) -> list[Line]:
    sides = []
    for index, name in enumerate(("original", "transformed")):
        found = [block.inputs.get(key, (None, None))[index] for block in blocks]
        values = tuple(None if spread is None else get(spread) for spread in found)
        if any(value is not None for value in values):
            sides.append(Line(name, index, values))
    return sides


def outliers(blocks: Sequence[BlockRow]) -> Outliers | None:
    """The worst inputs; None where nothing is known of any."""
    found = [
        (_ratio(before), block.number, key, before, after)
        for block in blocks
        for key, (before, after) in block.inputs.items()
        if before is not None and before.outliers is not None
    ]
    if not found:
        return None
    having = sorted((one for one in found if one[3].outliers), key=lambda one: (-one[0], one[1], one[2]))
    rows = [_row(number, key, before, after) for _, number, key, before, after in having[:_MOST]]
    return Outliers(tuple(rows), len(having), any(after is not None for *_, after in found))


def _ratio(spread: Spread | None) -> float:
    return max((ratio for _, ratio in spread.worst), default=0.0) if spread is not None else 0.0


def _row(block: int, key: str, before: Spread, after: Spread | None) -> OutlierRow:
    named = [f"{channel} (×{number(ratio, 3)})" for channel, ratio in before.worst[:_MOST_WORST]]
    return OutlierRow(
        block,
        short(key),
        str(before.outliers),
        MISSING if after is None or after.outliers is None else str(after.outliers),
        percent(before.share),
        percent(None if after is None else after.share),
        ", ".join(named),
    )
