"""What the comparison of several runs shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..console import duration, human
from . import words
from .chart import Chart, Line, line_chart
from .data import Evaluation, Run
from .heat import MEASURES, Measure, by_kind
from .sections import Recipe, compressed, models_of, original_of, recipe_of, scheme_of

_KINDS = {"ppl": "Perplexity", "decode_ppl": "Perplexity, decoding", "token_acc": "Top-1 agreement", "lm_eval": ""}
_LOW, _HIGH = "low", "high"
_COLOURS = 8


@dataclass(frozen=True)
class Entry:
    """A number of one run; ``best`` among those that can be compared with it."""

    text: str
    best: bool = False
    note: str = ""


@dataclass(frozen=True)
class NumberRow:
    """A number of every run.

    Attributes:
        name: what it is.
        note: when two runs' numbers can't be compared, or how it was measured.
        entries: in the order of the runs.
    """

    name: str
    note: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Table:
    """Numbers of every run under a title."""

    title: str
    rows: tuple[NumberRow, ...]


@dataclass(frozen=True)
class Difference:
    """A key of the configuration, and what each run has there."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """One run."""

    name: str
    colour: int
    model: str
    method: str
    scheme: str
    finished: bool
    recipe: Recipe


@dataclass(frozen=True)
class Comparison:
    """Everything that the template of several runs shows."""

    columns: tuple[Column, ...]
    numbers: Table
    error: Chart | None
    kinds: tuple[Table, ...]
    differences: tuple[Difference, ...]
    missing: tuple[str, ...]


def comparison_of(runs: Sequence[Run]) -> Comparison:
    """The content of a comparison."""
    names = unique_names(runs)
    columns = [
        Column(
            name,
            index % _COLOURS + 1,
            run.model_name,
            " → ".join(run.methods),
            "; ".join(f"{what}: {text}" for what, text in scheme_of(run)),
            run.finished,
            recipe_of(run),
        )
        for index, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    blocks = sorted({block.number for run in runs for block in run.blocks})
    curves = [Line(column.name, column.colour, _errors(run, blocks)) for column, run in zip(columns, runs, strict=True)]
    error = line_chart("Relative error behind each block", blocks, curves, axis="relative error", log=True)
    kinds = (_kinds(runs, measure) for measure in MEASURES)
    return Comparison(
        tuple(columns),
        Table("Numbers", tuple(_numbers(runs))),
        error,
        tuple(table for table in kinds if table.rows),
        tuple(differences([run.config for run in runs])),
        tuple(
            f"{name} isn't finished: what it lacks is left out."
            for name, run in zip(names, runs, strict=True)
            if not run.finished
        ),
    )


def unique_names(runs: Sequence[Run]) -> list[str]:
    """A name for each: that of its folder; with as much of the path before it as keeps them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({index + 1})" for index, run in enumerate(runs)]


def marked(values: Sequence[float | None], better: str | None, write: Callable[[float], str]) -> tuple[Entry, ...]:
    """Entries with the best marked, or those that share it; none where all have the same, or only one has any."""
    there = [value for value in values if value is not None]
    best = None
    if better is not None and len(there) > 1 and len(set(there)) > 1:
        best = min(there) if better == _LOW else max(there)
    return tuple(
        Entry(words.MISSING) if value is None else Entry(write(value), best is not None and value == best)
        for value in values
    )


# --- the table of numbers --------------------------------------------------------------------------------------------


def _numbers(runs: Sequence[Run]) -> list[NumberRow]:
    rows = [*_evaluations(runs)]
    for name, get, better, write in _FACTS:
        values = [get(run) for run in runs]
        if any(value is not None for value in values):
            rows.append(NumberRow(name, "", marked(values, better, write)))
    return rows


def _evaluations(runs: Sequence[Run]) -> list[NumberRow]:
    """A row for each number that was measured, of the original, where it was, and of the compressed model; the best is
    marked only where all were measured alike."""
    rows = []
    for key in dict.fromkeys(_key(one) for run in runs for one in run.evaluations if one.value is not None):
        found = [next((one for one in run.evaluations if _key(one) == key), None) for run in runs]
        alike = len({one.identity for one in found if one is not None}) == 1
        first = next(one for one in found if one is not None)
        better = _direction(first) if alike else None
        note = first.protocol if alike else "measured by different protocols: not comparable"
        rows.append(
            NumberRow(
                _title(first),
                note,
                marked([None if one is None else one.value for one in found], better, _writer(first)),
            )
        )
        if any(one is not None and one.kl is not None for one in found):
            kl = [None if one is None else one.kl for one in found]
            rows.append(
                NumberRow("KL divergence", "mean, nats per token", marked(kl, (alike and _LOW) or None, words.number))
            )
    return rows


def _key(one: Evaluation) -> tuple[str, ...]:
    return (one.kind, one.name, one.position, one.metric or "")


def _title(one: Evaluation) -> str:
    what = f"{one.name}, {one.metric}" if one.kind == "lm_eval" else f"{_KINDS.get(one.kind, one.kind)} on {one.name}"
    return f"{what} ({one.position})"


def _direction(one: Evaluation) -> str | None:
    """Whether less or more is better; nothing of the original, which no run changes."""
    if one.position == "pretrain":
        return None
    if one.kind == "lm_eval":
        return _LOW if any(word in (one.metric or "") for word in ("perplexity", "bits_per_byte", "loss")) else _HIGH
    return {"ppl": _LOW, "decode_ppl": _LOW, "token_acc": _HIGH}.get(one.kind)


def _writer(one: Evaluation) -> Callable[[float], str]:
    return (
        (lambda value: words.percent(value, 2)) if one.kind == "token_acc" else (lambda value: words.number(value, 5))
    )


def _size(run: Run) -> float | None:
    return min((float(output.size) for output in models_of(run)), default=None)


def _rise(run: Run) -> float | None:
    one = compressed(run, "ppl")
    before = None if one is None else original_of(run, one)
    return one.value / before - 1 if one is not None and one.value is not None and before else None


def _mean_error(run: Run) -> float | None:
    """Of outputs on the analysis's sample, which is the same for all methods; their own errors aren't."""
    ratios = [layer.sqnr_db for block in run.blocks for layer in block.layers.values() if layer.sqnr_db is not None]
    return fmean(10 ** (-ratio / 10) for ratio in ratios) if ratios and run.finished else None


def _last_error(run: Run) -> float | None:
    return run.blocks[-1].error if run.blocks and run.finished else None


def _fact(key: str) -> Callable[[Run], float | None]:
    return lambda run: run.facts.get(key) or None


_FACTS: tuple[tuple[str, Callable[[Run], float | None], str | None, Callable[[float], str]], ...] = (
    ("Rise of the perplexity", _rise, _LOW, lambda value: f"{100 * value:+.2f} %"),
    ("Mean relative error of the layers", _mean_error, _LOW, words.number),
    ("Relative error behind the last block", _last_error, _LOW, words.number),
    ("Bits per weight in the quantized layers", _fact("bits_per_weight"), _LOW, words.number),
    ("Size of the smallest written model", _size, _LOW, human),
    ("Layers treated by a simpler method", lambda run: float(len(run.fallbacks)), _LOW, lambda value: f"{value:.0f}"),
    ("Calibration tokens", _fact("calibration_tokens"), None, lambda value: f"{value:,.0f}"),
    ("Time", _fact("seconds"), _LOW, duration),
    ("Peak memory of the host", _fact("peak_host_bytes"), _LOW, human),
    ("Peak memory of the device", _fact("peak_device_bytes"), _LOW, human),
)


# --- blocks, kinds of layers, configurations -------------------------------------------------------------------------


def _errors(run: Run, blocks: Sequence[int]) -> tuple[float | None, ...]:
    by_number = {block.number: block.error for block in run.blocks}
    return tuple(by_number.get(number) for number in blocks)


def _kinds(runs: Sequence[Run], measure: Measure) -> Table:
    """A measure's mean over the blocks, for each kind of layer."""
    means = [_means(run, measure) for run in runs]
    rows = [
        NumberRow(kind, "", marked([own.get(kind) for own in means], measure.better, measure.write))
        for kind in dict.fromkeys(kind for own in means for kind in own)
    ]
    return Table(measure.title, tuple(rows))


def _means(run: Run, measure: Measure) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for block in run.blocks:
        for kind, layers in by_kind(block).items():
            found.setdefault(kind, []).extend(value for layer in layers if (value := measure.get(layer)) is not None)
    return {kind: fmean(values) for kind, values in found.items() if values}


def differences(configs: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """The keys in which configurations differ, but for where they write to."""
    flat = [dict(_flat(config)) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    found = [(key, [one.get(key, words.MISSING) for one in flat]) for key in keys if key != "save.save_path"]
    return [Difference(key, tuple(values)) for key, values in found if len(set(values)) > 1]


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, below in value.items() for pair in _flat(below, f"{path}.{key}".lstrip("."))]
    if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        return [pair for index, below in enumerate(value) for pair in _flat(below, f"{path}[{index}]")]
    if isinstance(value, list):
        return [(path, ", ".join(map(str, value)) or "none")]
    return [(path, words.MISSING if value is None else str(value))]
