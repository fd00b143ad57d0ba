"""Heat maps: a number of every Linear, kinds of layers down, blocks across."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from ..experts import collapsed
from .data import BlockRow, LayerRow
from .words import number, percent

LEVELS = 10  # of colour; the style has as many


@dataclass(frozen=True)
class Measure:
    """A number of a Linear.

    Attributes:
        key: short name for the page.
        title: what it is.
        note: how to read it, one sentence.
        get: the number.
        heat: what is coloured; larger is hotter.
        write: the number in words.
        better: whether less or more of it is better; None where neither is.
    """

    key: str
    title: str
    note: str
    get: Callable[[LayerRow], float | None]
    heat: Callable[[float], float]
    write: Callable[[float], str]
    better: Literal["low", "high"] | None = None


def _log(value: float) -> float:
    return math.log10(max(value, 1e-12))


MEASURES = (
    Measure(
        "error",
        "Relative error",
        "|(W − W′)X|² / |WX|² of each layer's output, as its method measured it (on its calibration text, a sample, or "
        "the weights alone), coloured logarithmically; the scale's right end is the worst.",
        lambda layer: layer.error,
        _log,
        number,  # methods measure it on different inputs: nothing to be compared between runs
    ),
    Measure(
        "sqnr",
        "SQNR",
        "Signal to quantization noise of each layer's output in dB; more is better.",
        lambda layer: layer.sqnr_db,
        lambda value: -value,
        lambda value: f"{value:.2f} dB",
        better="high",
    ),
    Measure(
        "cosine",
        "Cosine",
        "Cosine between each layer's output and the original's; coloured by the distance from 1.",
        lambda layer: layer.cosine,
        lambda value: _log(1 - value),
        lambda value: f"{value:.6f}",
        better="high",
    ),
    Measure(
        "kurtosis",
        "Weight kurtosis",
        "Fourth standardized moment of each weight; 3 is a normal distribution, more has heavier tails.",
        lambda layer: layer.kurtosis,
        _log,
        number,
    ),
    Measure(
        "bits",
        "Bits per weight",
        "Codes, scales and zero points together.",
        lambda layer: layer.bits,
        float,
        lambda value: f"{value:.3f}",
    ),
    Measure(
        "sparsity",
        "Sparsity",
        "Share of each weight that was pruned.",
        lambda layer: layer.sparsity,
        float,
        lambda value: percent(value, 2),
    ),
    Measure(
        "zeros",
        "Zero codes",
        "Share of codes that stand for zero.",
        lambda layer: layer.zeros,
        float,
        lambda value: percent(value, 2),
    ),
    Measure(
        "clipped",
        "Clipped weights",
        "Share of weights beyond the range of the grid.",
        lambda layer: layer.clipped,
        float,
        lambda value: percent(value, 3),
        better="low",
    ),
)


@dataclass(frozen=True)
class Cell:
    """One square: its text, its colour (0 to ``LEVELS`` - 1) and what else to say of it. No text: no number."""

    text: str
    level: int | None = None
    more: str = ""


@dataclass(frozen=True)
class HeatRow:
    """One kind of layer."""

    name: str
    cells: tuple[Cell, ...]
    mean: str


@dataclass(frozen=True)
class Heat:
    """One heat map.

    Attributes:
        key: short name.
        title: what it shows.
        note: how to read it.
        columns: numbers of the blocks.
        rows: kinds of layers.
        low: number of the coolest colour, in words.
        high: that of the hottest.
        judged: whether hotter is worse.
    """

    key: str
    title: str
    note: str
    columns: tuple[int, ...]
    rows: tuple[HeatRow, ...]
    low: str
    high: str
    judged: bool


def by_kind(block: BlockRow) -> dict[str, list[LayerRow]]:
    """A block's layers by kind; the same Linear of all experts is one."""
    return {kind: [block.layers[name] for name in names] for kind, names in collapsed(block.layers).items()}


def heat(blocks: Sequence[BlockRow], measure: Measure) -> Heat | None:
    """The heat map of a measure; None if no layer has the number."""
    columns = [by_kind(block) for block in blocks]
    kinds = list(dict.fromkeys(kind for column in columns for kind in column))
    values = {kind: [_values(column.get(kind, ()), measure) for column in columns] for kind in kinds}
    means = [fmean(found) for row in values.values() for found in row if found]
    if not means:
        return None
    low, high = min(means, key=measure.heat), max(means, key=measure.heat)
    span = (measure.heat(low), measure.heat(high))
    rows = [
        HeatRow(kind, tuple(_cell(found, measure, span) for found in row), _mean(row, measure))
        for kind, row in values.items()
        if any(row)
    ]
    numbers = tuple(block.number for block in blocks)
    ends = measure.write(low), measure.write(high)
    return Heat(
        measure.key, measure.title, measure.note, numbers, tuple(rows), *ends, judged=measure.better is not None
    )


def heats(blocks: Sequence[BlockRow]) -> list[Heat]:
    """All heat maps that there are numbers for."""
    return [made for measure in MEASURES if (made := heat(blocks, measure)) is not None]


def _values(layers: Sequence[LayerRow], measure: Measure) -> list[float]:
    found = (measure.get(layer) for layer in layers)
    return [value for value in found if value is not None]


def _cell(found: Sequence[float], measure: Measure, span: tuple[float, float]) -> Cell:
    if not found:
        return Cell("")
    mean = fmean(found)
    more = ""
    if len(found) > 1:
        more = f"mean of {len(found)} experts, {measure.write(min(found))} to {measure.write(max(found))}"
    return Cell(measure.write(mean), level_of(measure.heat(mean), span), more)


def level_of(heat: float, span: tuple[float, float]) -> int:
    """The colour of a heat between the coolest and the hottest."""
    low, high = span
    share = (heat - low) / (high - low) if high > low else 0.0
    return min(int(share * LEVELS), LEVELS - 1)


def _mean(row: Sequence[Sequence[float]], measure: Measure) -> str:
    means = [fmean(found) for found in row if found]
    return measure.write(fmean(means))
