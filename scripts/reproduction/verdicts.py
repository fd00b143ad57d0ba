"""What came of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from llmc.errors import ConfigError
from llmc.eval.perplexity import perplexity

from .golden import Golden, golden_key
from .published import Published
from .running import Outcome
from .suites import Cell, Comparison


class Verdict(StrEnum):
    """Of one number."""

    WITHIN = "within"
    BETTER = "better"
    OUT = "OUT"
    UNSET = "no golden number"
    FAILED = "FAILED"
    MISSING = "not run"


WRONG = frozenset({Verdict.OUT, Verdict.UNSET, Verdict.FAILED})
"""What a suite must not have to be green."""


@dataclass(frozen=True)
class Judged:
    """A comparison with its outcome.

    Attributes:
        cell: what was run.
        comparison: what was asked.
        reference: the number to be compared with; None if there is none.
        source: where it comes from.
        measured: the number that came out; None if there is none.
        verdict: of both.
    """

    cell: Cell
    comparison: Comparison
    reference: float | None
    source: str
    measured: float | None
    verdict: Verdict

    @property
    def difference(self) -> float | None:
        """Relative to the reference."""
        return None if self.measured is None or not self.reference else self.measured / self.reference - 1


def judge(measured: float, reference: float, tolerance: float, *, both_sides: bool) -> Verdict:
    """Whether a perplexity is the one that it should be.

    Args:
        measured: what came out; whatever isn't finite is out.
        reference: what should.
        tolerance: the largest relative difference.
        both_sides: whether less than that is wrong too.
    """
    difference = measured / reference - 1
    if not math.isfinite(difference) or difference > tolerance:
        return Verdict.OUT
    if difference >= -tolerance:
        return Verdict.WITHIN
    return Verdict.OUT if both_sides else Verdict.BETTER


def judge_cell(outcome: Outcome, published: Mapping[str, Published], golden: Mapping[str, Golden]) -> list[Judged]:
    """Every comparison of a cell.

    Raises:
        ConfigError: the run measured nothing that a comparison asks for.
    """
    return [_judge(outcome, one, published, golden) for one in outcome.cell.compare]


def measured_golden(outcome: Outcome) -> dict[str, Golden]:
    """What a finished run measured of the numbers that its golden comparisons ask for, by their keys."""
    if outcome.metrics is None:
        return {}
    rows = [_row(outcome.cell, one, outcome.metrics) for one in outcome.cell.compare if one.golden]
    return {_key(outcome.cell, row): Golden(row["value"], row["tokens_sha256"]) for row in rows}


def _judge(
    outcome: Outcome, asked: Comparison, published: Mapping[str, Published], golden: Mapping[str, Golden]
) -> Judged:
    cell = outcome.cell
    known = None if asked.published is None else published[asked.published]
    source = "golden" if known is None else known.publisher
    reference = None if known is None else known.value
    if outcome.metrics is None:
        verdict = Verdict.FAILED if outcome.error else Verdict.MISSING
        return Judged(cell, asked, reference, source, None, verdict)
    row = _row(cell, asked, outcome.metrics)
    value = _value(row, asked.windows)
    if known is None:
        kept = golden.get(_key(cell, row))
        if kept is None or kept.tokens_sha256 != row["tokens_sha256"]:
            return Judged(cell, asked, None, source, value, Verdict.UNSET)
        reference = kept.value
    assert reference is not None
    verdict = judge(value, reference, asked.tolerance, both_sides=asked.is_two_sided)
    return Judged(cell, asked, reference, source, value, verdict)


def _key(cell: Cell, row: Mapping[str, Any]) -> str:
    return golden_key(cell.id, row["position"], row["name"])


def _row(cell: Cell, asked: Comparison, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one evaluation that a comparison asks for."""
    rows: Sequence[Mapping[str, Any]] = [
        row
        for row in metrics["evaluation"]
        if row["kind"] == "ppl" and row["position"] == asked.position and asked.text in (None, row["name"])
    ]
    if len(rows) != 1:
        what = f"{asked.position} on {asked.text or 'a text'}"
        raise ConfigError(f"cell {cell.id}: {len(rows)} perplexities of {what} were measured", "set position and text")
    return rows[0]


def _value(row: Mapping[str, Any], windows: int | None) -> float:
    if windows is None:
        return float(row["value"])
    losses = row["window_losses"]
    if len(losses) < windows:
        raise ConfigError(f"{windows} windows are compared, but {len(losses)} were measured", "set fewer windows")
    return perplexity(losses[:windows])
