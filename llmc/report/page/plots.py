"""The charts of a report as PNG and SVG files, made with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import RunError
from .compare import unique_names
from .data import Run
from .heat import MEASURES, Measure, by_kind
from .inputs import keys_of, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "svg.hashsalt": "llmc"}
_DRAWN = {"error", "sqnr", "kurtosis", "sparsity"}


def draw_plots(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write each chart that there are numbers for, as PNG and as SVG.

    Args:
        runs: one, or several to compare.
        folder: gets the files; is made.

    Raises:
        RunError: matplotlib isn't installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise RunError(f"--plots needs matplotlib: {problem}", "pip install 'llmc[report]'") from problem
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with matplotlib.rc_context(_STYLE):
        for name, draw in _charts(runs):
            figure = Figure(figsize=(7.2, 3.4), layout="constrained")
            draw(figure)
            for kind in ("png", "svg"):
                file = folder / f"{name}.{kind}"
                figure.savefig(file, dpi=160, metadata={"Date": None} if kind == "svg" else None)
                written.append(file)
    return written


def _charts(runs: Sequence[Run]) -> Iterator[tuple[str, Callable[[Figure], None]]]:
    names = unique_names(runs)
    if any(block.error is not None for run in runs for block in run.blocks):
        yield "error_by_block", lambda figure: _errors(figure, runs, names)
    for run, name in zip(runs, names, strict=True):
        end = "" if len(runs) == 1 else f"_{name.replace('/', '_')}"
        for measure in MEASURES:
            if measure.key in _DRAWN and _has(run, measure):
                yield f"{measure.key}_by_layer{end}", _heat_of(run, measure)
        if keys_of(run.blocks):
            yield f"kurtosis_of_inputs{end}", _kurtosis_of(run)


def _has(run: Run, measure: Measure) -> bool:
    return any(measure.get(layer) is not None for block in run.blocks for layer in block.layers.values())


def _errors(figure: Figure, runs: Sequence[Run], names: Sequence[str]) -> None:
    axes = figure.subplots()
    for run, name in zip(runs, names, strict=True):
        known = [(block.number, block.error) for block in run.blocks if block.error is not None]
        axes.plot(*zip(*known, strict=True), label=name, linewidth=1.4)
    _label(axes, "relative error of the hidden state")
    if len(runs) > 1:
        axes.legend(frameon=False)


def _heat_of(run: Run, measure: Measure) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        columns = [by_kind(block) for block in run.blocks]
        kinds = list(dict.fromkeys(kind for column in columns for kind in column))
        cells = np.array([[_mean(column.get(kind, ()), measure) for column in columns] for kind in kinds])
        axes = figure.subplots()
        log = measure.key in ("error", "kurtosis") and np.nanmin(cells) > 0
        image = axes.imshow(cells, aspect="auto", cmap="magma_r", norm="log" if log else None, interpolation="nearest")
        axes.set_yticks(range(len(kinds)), kinds)
        step = max(1, len(columns) // 10)
        axes.set_xticks(range(0, len(columns), step), [str(block.number) for block in run.blocks[::step]])
        axes.set_xlabel("block")
        figure.colorbar(image, label=measure.title)

    return draw


def _mean(layers: Sequence[Any], measure: Measure) -> float:
    found = [value for layer in layers if (value := measure.get(layer)) is not None]
    return fmean(found) if found else float("nan")


def _kurtosis_of(run: Run) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, key in enumerate(keys_of(run.blocks)):
            for side, line in enumerate(("-", "--")):
                known = [
                    (block.number, spread.kurtosis)
                    for block in run.blocks
                    if (spread := block.inputs.get(key, (None, None))[side]) is not None and spread.kurtosis is not None
                ]
                if known:
                    label = short(key) if side == 0 else None
                    axes.plot(*zip(*known, strict=True), line, color=f"C{index}", label=label, linewidth=1.2)
        _label(axes, "kurtosis (dashed: transformed)")
        axes.legend(frameon=False, fontsize=7)

    return draw


def _label(axes: Axes, what: str) -> None:
    axes.set(xlabel="block", ylabel=what)
    if min((float(np.min(line.get_ydata())) for line in axes.get_lines()), default=0) > 0:
        axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.3)
