"""What the report of one run shows: figures, charts and tables, chosen from what the run has."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import RunError
from ..console import duration, human
from . import words
from .chart import Chart, Line, line_chart
from .data import COMPRESSED, ORIGINAL, Evaluation, Experts, Output, Run
from .heat import Cell, Heat, HeatRow, heats, level_of
from .inputs import Outliers, kurtosis_charts, outliers
from .recipe import file_of, install_of, yaml_of
from .surface import Surfaces, read_surfaces


@dataclass(frozen=True)
class Figure:
    """One number at the top of the page.

    Attributes:
        label: what it is.
        value: in words.
        before: the original's, in words.
        change: from that, in words.
        note: how it was measured.
    """

    label: str
    value: str
    before: str = ""
    change: str = ""
    note: str = ""


@dataclass(frozen=True)
class Share:
    """A part of a whole, for a bar."""

    name: str
    value: str
    percent: float


@dataclass(frozen=True)
class Size:
    """A bar of the comparison of sizes."""

    name: str
    value: str
    percent: float
    note: str = ""


@dataclass(frozen=True)
class Recipe:
    """How to repeat the run: the file's name and content, the command, what to install."""

    file: str
    yaml: str
    command: str
    install: str


@dataclass(frozen=True)
class Page:
    """Everything that the template of one run shows."""

    run: Run
    scheme: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...]
    missing: tuple[str, ...]
    sizes: tuple[Size, ...]
    error: Chart | None
    heats: tuple[Heat, ...]
    kurtosis: tuple[Chart, ...]
    outliers: Outliers | None
    surfaces: Surfaces | None
    surfaces_problem: str
    load: Heat | None
    seconds: tuple[Share, ...]
    block_seconds: Chart | None
    model: tuple[tuple[str, str], ...]
    recipe: Recipe


def page_of(run: Run) -> Page:
    """The content of a run's report."""
    surfaces, problem = _surfaces(run)
    numbers = [block.number for block in run.blocks]
    errors = Line("relative error", 1, tuple(block.error for block in run.blocks))
    spent = Line("seconds", 1, tuple(block.seconds for block in run.blocks))
    return Page(
        run=run,
        scheme=tuple(scheme_of(run)),
        figures=tuple(_figures(run)),
        missing=tuple(_missing(run)),
        sizes=tuple(_sizes(run)),
        error=line_chart("Relative error behind each block", numbers, [errors], axis="relative error", log=True),
        heats=tuple(heats(run.blocks)),
        kurtosis=tuple(kurtosis_charts(run.blocks)),
        outliers=outliers(run.blocks),
        surfaces=surfaces,
        surfaces_problem=problem,
        load=_load(run.experts),
        seconds=tuple(_seconds(run)),
        block_seconds=line_chart("Seconds of each block", numbers, [spent], axis="seconds", from_zero=True),
        model=tuple(_model(run)),
        recipe=recipe_of(run),
    )


# --- summary ---------------------------------------------------------------------------------------------------------


def scheme_of(run: Run) -> list[tuple[str, str]]:
    """What is quantized and pruned, in words; of an unfinished run what its configuration asks for."""
    facts = run.facts
    if not run.finished:
        return [(name, text) for name, text in _asked(run.config)]
    found = []
    if facts["scheme"] is not None:
        found.append(("weights", words.grid(facts["scheme"])))
    if facts["activations"] is not None:
        found.append(("activations", words.grid(facts["activations"])))
    if facts["kv_scheme"] is not None:
        found.append(("KV cache", words.cache(facts["kv_scheme"])))
    if facts["sparsity"] is not None:
        found.append(("pruning", words.pruned(facts["sparsity"])))
    for mixed in facts["mixed_schemes"]:
        parts = [f"{name} {words.grid(mixed[key])}" for key, name in _PARTS.items() if mixed[key] is not None]
        found.append((words.plural(len(mixed["layers"]), "layer"), "; ".join(parts) or "left as they are"))
    if facts["blocks_dropped"] is not None:
        dropped = facts["blocks_dropped"]["dropped"]
        found.append(("dropped", f"blocks {', '.join(map(str, dropped))}"))
    return found


_PARTS = {"weight": "weights", "act": "activations"}


def _asked(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    quant = config.get("quant") or {}
    sides = [(_PARTS[key], quant[key]) for key in _PARTS if quant.get(key)]
    return [(name, f"{side.get('bit')} bits, {str(side.get('granularity')).replace('_', ' ')}") for name, side in sides]


def compressed(run: Run, kind: str) -> Evaluation | None:
    """The number of the compressed model, the first of its kind."""
    return next(iter(run.find(kind, *COMPRESSED)), None)


def _figures(run: Run) -> list[Figure]:
    found = [*_perplexities(run), *_agreement(run)]
    if run.finished:
        found += [*_size_figures(run), *_cost_figures(run)]
    return found


def _perplexities(run: Run) -> list[Figure]:
    figures = []
    for kind, label in (("ppl", "Perplexity"), ("decode_ppl", "Perplexity, decoding")):
        for one in run.find(kind, *COMPRESSED):
            if one.value is None:
                continue
            before = original_of(run, one)
            figures.append(
                Figure(
                    f"{label} ({one.name})" if len(run.find(kind, one.position)) > 1 else label,
                    words.number(one.value, 5),
                    "" if before is None else words.number(before, 5),
                    "" if before is None else words.change(before, one.value),
                    one.protocol,
                )
            )
    return figures


def original_of(run: Run, one: Evaluation) -> float | None:
    """The original's number by the same protocol."""
    found = (other for other in run.find(one.kind, ORIGINAL) if other.identity == one.identity)
    return next((other.value for other in found), None)


def _agreement(run: Run) -> list[Figure]:
    figures = []
    if (one := compressed(run, "token_acc")) is not None:
        figures.append(Figure("Top-1 agreement", words.percent(one.value, 2), note=one.protocol))
        if one.kl is not None:
            figures.append(Figure("KL divergence", words.number(one.kl), note="mean, nats per token"))
    return figures


def _size_figures(run: Run) -> list[Figure]:
    figures, original = [], run.model["bytes"]
    models = [output for output in run.outputs if output.bits is not None]
    if models:
        least = min(models, key=lambda output: output.size)
        times = f"{words.number(original / least.size, 3)}× smaller" if least.size < original else "not smaller"
        figures.append(Figure("Size", human(least.size), human(original), times, least.name))
    bits = run.facts["bits_per_weight"]
    if bits is not None:
        figures.append(Figure("Bits per weight", words.number(bits, 4), note="in the quantized layers, with scales"))
    if run.facts["sparsity"] is not None:
        mean = run.facts["sparsity"]["mean"]
        figures.append(Figure("Sparsity", words.percent(mean), note="of the weights in the pruned layers"))
    if run.facts["kv_scheme"] is not None:
        bits = run.facts["kv_scheme"].get("bits_per_element")
        figures.append(Figure("Bits per key and value", words.number(bits, 3), note="in the KV cache"))
    return figures


def _cost_figures(run: Run) -> list[Figure]:
    facts = run.facts
    figures = [Figure("Time", duration(facts["seconds"]), note=f"on {run.model['device']}")]
    peak, device = facts["peak_host_bytes"], facts["peak_device_bytes"]
    figures.append(Figure("Peak memory", human(peak), note="of the host"))
    if device:
        figures.append(Figure("Peak device memory", human(device), note=f"of {run.model['device']}"))
    return figures


def _missing(run: Run) -> list[str]:
    """What the page doesn't show, and why."""
    found = []
    if not run.finished:
        found.append("Not finished: numbers of the whole model (perplexity, size, time) come at the end of the run.")
    elif not run.evaluations:
        found.append("No evaluation in this run: its configuration has no section eval, or no position to evaluate.")
    if not any(block.inputs for block in run.blocks):
        found.append(
            "No statistics of activations: the analysis was off (report.analysis), or the run comes from a llmc that "
            "didn't make them."
        )
    if run.surfaces is None and run.finished:
        found.append("No activation surfaces: surfaces.safetensors isn't beside metrics.json.")
    if run.finished and not run.outputs:
        found.append("Nothing was exported: no save_* is set.")
    return found


def _sizes(run: Run) -> list[Size]:
    models = [output for output in run.outputs if output.bits is not None]
    if not models:
        return []
    original = run.model["bytes"]
    most = max(original, *(output.size for output in models))
    bars = [Size("original", human(original), 100 * original / most)]
    for output in models:
        note = f"{words.percent(output.size / original, 0)}, {words.number(output.bits, 4)} bits a weight overall"
        bars.append(Size(output.name, human(output.size), 100 * output.size / most, note))
    return bars


# --- the rest --------------------------------------------------------------------------------------------------------


def _surfaces(run: Run) -> tuple[Surfaces | None, str]:
    """Surfaces, or why they can't be shown: they are an ornament that a report can do without."""
    if run.surfaces is None:
        return None, ""
    try:
        return read_surfaces(run.surfaces), ""
    except RunError as problem:
        return None, problem.message


def _load(experts: tuple[Experts, ...]) -> Heat | None:
    """Calibration tokens by expert and block."""
    counted = [one for one in experts if one.tokens]
    if not counted:
        return None
    most = max(max(one.tokens) for one in counted)
    columns = tuple(range(max(len(one.tokens) for one in counted)))
    rows = tuple(
        HeatRow(
            one.block,
            tuple(
                Cell(str(tokens), level_of(float(tokens) ** 0.5, (0.0, float(most) ** 0.5))) for tokens in one.tokens
            ),
            words.number(one.median),
        )
        for one in counted
    )
    note = "Calibration tokens that each expert was shown; the colour follows their square root."
    return Heat("load", "Tokens by expert", note, columns, rows, "0", f"{most:,}", judged=False)


def _seconds(run: Run) -> list[Share]:
    spent: Mapping[str, float] = run.facts.get("seconds_by_kind", {})
    total = run.facts.get("seconds", 0.0)
    if not spent or not total:
        return []
    shares = {**dict(sorted(spent.items(), key=lambda item: -item[1])), "other": max(total - sum(spent.values()), 0.0)}
    whole = sum(shares.values()) or 1.0
    return [
        Share(name, duration(value) if value >= 10 else f"{value:.1f} s", 100 * value / whole)
        for name, value in shares.items()
    ]


def _model(run: Run) -> list[tuple[str, str]]:
    model = run.model
    if not model:
        return [("model", str((run.config.get("model") or {}).get("path", "")))]
    facts = [
        ("path", model["path"]),
        ("architecture", model["adapter"]),
        ("blocks", str(model["blocks"])),
        ("size", human(model["bytes"])),
        ("computed in", f"{model['computing_dtype']} on {model['device']}"),
        ("calibrated on", words.plural(run.facts["calibration_tokens"], "token")),
        ("read", human(run.facts["bytes_read"])),
    ]
    return [*facts, ("input", model["input"])] if model.get("input") else facts


def recipe_of(run: Run) -> Recipe:
    """How to repeat a run."""
    file = file_of(run.name)
    command = f"python -m llmc --config {shlex.quote(file)}"
    return Recipe(file, yaml_of(run.config), command, install_of(run.versions))


def models_of(run: Run) -> list[Output]:
    """Outputs that hold a model."""
    return [output for output in run.outputs if output.bits is not None]
