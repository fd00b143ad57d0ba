"""What came out, as lines for the terminal and as a page of Markdown."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

import llmc

from .published import Published
from .running import Outcome
from .suites import Suite
from .verdicts import Judged, Verdict

_HEAD = ("cell", "model", "measured on", "reference", "measured", "difference", "tolerance", "verdict", "compared with")
_RIGHT = {"reference", "measured", "difference", "tolerance"}


def line(judged: Judged) -> str:
    """One comparison for the terminal."""
    return "  ".join(cell for cell in _cells(judged) if cell)


def summary(judged: Sequence[Judged]) -> str:
    """How many comparisons came to which end."""
    counts = Counter(one.verdict for one in judged)
    parts = [f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]]
    return f"{len(judged)} numbers: {', '.join(parts)}"


def missing_lines(outcomes: Iterable[Outcome]) -> list[str]:
    """Each thing that is missing, once, with the number of cells that lack it."""
    counts = Counter(what for outcome in outcomes for what in dict.fromkeys(outcome.missing))
    return [f"{what} [{count} cell{'s' * (count > 1)}]" for what, count in counts.items()]


def page(
    suite: Suite, outcomes: Sequence[Outcome], judged: Sequence[Judged], published: Mapping[str, Published]
) -> str:
    """The whole as Markdown."""
    blocks = [f"# {suite.title}", suite.about.strip(), f"**{summary(judged)}.** {_machine()}"]
    blocks.append(_table(judged))
    blocks += _section("Not run", missing_lines(outcomes))
    blocks += _section("What differs from the published recipe", _notes(outcomes))
    blocks += _section("What the sources don't say", _unstated(judged, published))
    failed = [f"### {one.cell.id}\n\n```text\n{one.error}\n```" for one in outcomes if one.error]
    blocks += ["## Failed", *failed] if failed else []
    return "\n\n".join(block for block in blocks if block) + "\n"


def _cells(judged: Judged) -> tuple[str, ...]:
    asked = judged.comparison
    where = asked.position + (f" {asked.text}" if asked.text else "")
    where += f", {asked.windows} windows" if asked.windows else ""
    difference = "" if judged.difference is None else f"{judged.difference:+.2%}"
    tolerance = f"{'±' if asked.is_two_sided else '+'}{asked.tolerance * 100:g}%"
    numbers = (_number(judged.reference), _number(judged.measured), difference, tolerance)
    return (judged.cell.id, judged.cell.model, where, *numbers, judged.verdict, judged.source)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _table(judged: Sequence[Judged]) -> str:
    lines = [_row(_HEAD), "|" + "|".join("---:" if name in _RIGHT else "---" for name in _HEAD) + "|"]
    return "\n".join([*lines, *(_row(_cells(one)) for one in judged)])


def _row(cells: Iterable[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {one}" for one in lines)] if lines else []


def _notes(outcomes: Iterable[Outcome]) -> list[str]:
    return [f"`{one.cell.id}`: {one.cell.note}" for one in outcomes if one.cell.note]


def _unstated(judged: Iterable[Judged], published: Mapping[str, Published]) -> list[str]:
    rows = [published[one.comparison.published] for one in judged if one.comparison.published]
    return list(dict.fromkeys(f"`{row.id}`: {row.unstated}" for row in rows if not row.is_complete))


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"llmc {llmc.__version__}, {versions}, {device}."


def write_page(file: Path, text: str) -> None:
    """Write the page, into folders that needn't be there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
