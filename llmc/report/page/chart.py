"""Line charts as geometry: everything in per cent of the plot, so that a page may stretch them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .words import number

HEIGHT = WIDTH = 1000  # of the drawing's own coordinates
_PAD = 0.06  # of the range, above and below


@dataclass(frozen=True)
class Line:
    """One curve: its name, its colour's number, and its values; None where there is a gap."""

    name: str
    colour: int
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, at so many per cent of it."""

    at: float
    text: str


@dataclass(frozen=True)
class Hover:
    """What is said where the pointer is above a value.

    Attributes:
        start: left edge, per cent.
        width: per cent.
        at: the value's own place, per cent.
        tip: text, a line for each curve.
        dots: pairs of colour and height in per cent.
    """

    start: float
    width: float
    at: float
    tip: str
    dots: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Curve:
    """A line as an SVG path in the drawing's coordinates, and the ``area`` below it."""

    name: str
    colour: int
    path: str
    area: str


@dataclass(frozen=True)
class Chart:
    """A drawn chart."""

    title: str
    axis: str
    curves: tuple[Curve, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    hovers: tuple[Hover, ...]
    spoken: str


@dataclass(frozen=True)
class Scale:
    """Values to per cent of the height."""

    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], log: bool, from_zero: bool = False) -> Scale:
        """A scale with some room above and below; logarithmic only where all values are positive."""
        if from_zero:
            return cls(0.0, max(values) * (1 + _PAD) or 1.0, log=False)
        log = log and min(values) > 0
        low, high = (math.log10(min(values)), math.log10(max(values))) if log else (min(values), max(values))
        room = (high - low) * _PAD or (0.1 if log else abs(high) * 0.1 or 1.0)
        return cls(low - room, high + room, log)

    def at(self, value: float) -> float:
        """Per cent from below."""
        place = math.log10(value) if self.log else value
        return round(100 * (place - self.low) / (self.high - self.low), 2)

    def ticks(self) -> list[float]:
        """Round values, three to seven of them."""
        return self._decades() if self.log else _steps(self.low, self.high)

    def _decades(self) -> list[float]:
        first, last = math.floor(self.low), math.ceil(self.high)
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            found = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
            found = [value for value in found if self.low <= math.log10(value) <= self.high]
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / 6)]
        return [float(f"{10**value:.2g}") for value in (self.low, (self.low + self.high) / 2, self.high)]


def _steps(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def line_chart(
    title: str,
    blocks: Sequence[int],
    lines: Sequence[Line],
    *,
    axis: str,
    log: bool = False,
    from_zero: bool = False,
    scale: Scale | None = None,
    write: Callable[[float], str] = number,
) -> Chart | None:
    """A chart over blocks; None if no line has a value.

    Args:
        title: what it shows.
        blocks: their numbers, a value of each line for each.
        lines: the curves.
        axis: what is measured, with its unit.
        log: whether the axis is logarithmic.
        from_zero: whether it begins at zero; not with ``log``.
        scale: to share with another chart.
        write: a value in words.
    """
    values = [value for line in lines for value in line.values if value is not None]
    if not values:
        return None
    scale = scale or Scale.over(values, log, from_zero)
    places = [round(100 * (index + 0.5) / len(blocks), 3) for index in range(len(blocks))]
    curves = [_curve(places, line, scale) for line in lines]
    hovers = [_hover(index, blocks, places[index], lines, scale, write) for index in range(len(blocks))]
    every = max(1, math.ceil(len(blocks) / 12))
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if step >= every)
    across = [Tick(place, str(block)) for place, block in zip(places, blocks, strict=True) if block % every == 0]
    up = [Tick(scale.at(value), _mark(value)) for value in scale.ticks()]
    return Chart(
        title, axis, tuple(curves), tuple(across), tuple(up), tuple(hovers), _spoken(title, blocks, lines, write)
    )


def _mark(value: float) -> str:
    return f"{value:,g}" if value == 0 or 1e-3 <= abs(value) < 1e6 else number(value, 3)


def _curve(places: Sequence[float], line: Line, scale: Scale) -> Curve:
    """Pieces between gaps; a single value is a short dash, or it would be invisible."""
    pieces: list[list[tuple[int, int]]] = [[]]
    for place, value in zip(places, line.values, strict=True):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((round(place * WIDTH / 100), round(HEIGHT - scale.at(value) * HEIGHT / 100)))
    path, area = "", ""
    for piece in filter(None, pieces):
        through = "L".join(f"{x} {y}" for x, y in piece)
        path += f"M{through}" + ("h1" if len(piece) == 1 else "")
        area += f"M{piece[0][0]} {HEIGHT}L{through}L{piece[-1][0]} {HEIGHT}Z"
    return Curve(line.name, line.colour, path, area)


def _hover(
    index: int,
    blocks: Sequence[int],
    place: float,
    lines: Sequence[Line],
    scale: Scale,
    write: Callable[[float], str],
) -> Hover:
    there = [(line, value) for line in lines if (value := line.values[index]) is not None]
    said = [f"block {blocks[index]}", *(f"{line.name}: {write(value)}" for line, value in there)]
    width = round(100 / len(blocks), 3)
    dots = tuple((line.colour, scale.at(value)) for line, value in there)
    return Hover(round(index * 100 / len(blocks), 3), width, place, "\n".join(said), dots)


def _spoken(title: str, blocks: Sequence[int], lines: Sequence[Line], write: Callable[[float], str]) -> str:
    parts = []
    for line in lines:
        there = [(value, block) for value, block in zip(line.values, blocks, strict=True) if value is not None]
        if there:
            least, most = min(there), max(there)
            parts.append(
                f"{line.name} from {write(least[0])} in block {least[1]} to {write(most[0])} in block {most[1]}"
            )
    return f"{title} by block: {'; '.join(parts)}"
