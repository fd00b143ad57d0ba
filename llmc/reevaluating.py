"""Evaluates what there is: a finished run from what it wrote, or a model as it came. Nothing is compressed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import LoadedConfig
from .errors import ConfigError
from .eval.measure import ORIGINAL, Evaluated
from .evaluating import Evaluable, go_through
from .finished import open_finished, prepare_again, read_metrics
from .measuring import Measuring
from .prepare import Prepared, prepare
from .report.metrics import with_evaluations
from .report.page import refresh_report
from .stream.files import write_json
from .stream.memory import give_back_memory, peak_host_memory, share_heap
from .stream.options import Listener
from .tasking import Answered, run_jobs
from .workspace import METRICS

_MODEL_SECTIONS = ("quant", "sparse", "ignored_layers")
_BASE_KEYS = ("device", "threads", "host_memory_gb", "experts")  # of base: where and how, not what


@dataclass(frozen=True)
class Reevaluated:
    """What was measured.

    Attributes:
        evaluations: the numbers.
        answers: what tasks and prompts found.
        written: the file that holds them now; None if none does.
        seconds: wall time.
        peak_host: largest resident size of this process, bytes.
        warnings: what of the configuration had no effect, and why the run's report wasn't written again.
    """

    evaluations: list[Evaluated]
    answers: list[Answered]
    written: Path | None
    seconds: float
    peak_host: int
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Opened:
    """What is to be measured, of which run if it is one's."""

    prepared: Prepared
    warnings: list[str]
    folder: Path | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def evaluable(self, states: frozenset[str]) -> Evaluable:
        """What the states need."""
        if self.folder is None or states <= {ORIGINAL}:
            return Evaluable.original(self.prepared)
        return open_finished(self.folder, self.metrics, self.prepared)


def reevaluate(loaded: LoadedConfig, run: Path | None, *, write: bool, listener: Listener) -> Reevaluated:
    """Measure what the section ``eval`` says, of the model that a run made and of the one that it began with.

    Every number is the one that the run itself would have given.

    Args:
        loaded: says what to measure, and where the run is unless ``run`` does; what it says of quantizing and pruning
            has no effect: the run's own configuration counts.
        run: ``save_path`` of a finished run. None: that of the configuration; and where that compresses nothing, the
            model as it came.
        write: put the numbers into the run's ``metrics.json``, in the place of earlier ones of the same thing, and
            write its report again, where it has one.
        listener: hears of progress.

    Raises:
        LlmcError: nothing is to be measured, the run isn't finished or doesn't hold what that needs, or another model
            lies where its original was. Nothing has been written.
    """
    started = time.perf_counter()
    if not any(one.eval_pos for one in loaded.config.eval):
        raise ConfigError("eval: nothing is to be evaluated", "add the section eval, with eval_pos")
    opened = _open(loaded, run)
    share_heap()
    give_back_memory()  # of the tokenizer
    measuring = Measuring(opened.prepared.evaluations, opened.prepared.recipe.kv)
    passing = _Passing(listener)
    if measuring.states:
        go_through(opened.evaluable(measuring.states), measuring.prefilled, measuring.decoded, passing)
    results = measuring.results()
    written = opened.folder / METRICS if write and opened.folder is not None else None
    _write(written, opened.metrics, results)  # whatever becomes of a server that is asked next
    answers = run_jobs(opened.prepared, opened.folder, passing)
    _write(written, opened.metrics, [*results, *answers])
    warnings = [*opened.warnings, *([] if written is None else refresh_report(written.parent))]
    return Reevaluated(results, answers, written, time.perf_counter() - started, peak_host_memory(), warnings)


def _write(file: Path | None, metrics: Mapping[str, Any], found: Sequence[Evaluated | Answered]) -> None:
    if file is not None and found:
        write_json(file, with_evaluations(metrics, [one.to_dict() for one in found]))


def _open(loaded: LoadedConfig, run: Path | None) -> _Opened:
    """Prepare what is to be measured."""
    config = loaded.config
    compresses = config.quant is not None or config.sparse is not None
    if run is None and not compresses:
        prepared = prepare(loaded)
        return _Opened(prepared, prepared.warnings)
    if run is None and config.save.save_path is None:
        raise ConfigError("save.save_path: missing; there is no run to evaluate", "name a finished run with --from")
    folder = run or Path(config.save.save_path or "").expanduser()
    metrics = read_metrics(folder)
    base = {key: loaded.resolved["base"][key] for key in _BASE_KEYS}
    prepared = prepare_again(metrics, config.model.path, base=base, evaluations=loaded.resolved["eval"])
    own = prepared.loaded.resolved
    idle = [key for key in _MODEL_SECTIONS if compresses and loaded.resolved[key] != own[key]]
    warnings = [f"{', '.join(idle)}: not the run's, and without effect: what {folder} holds is evaluated"] * bool(idle)
    return _Opened(prepared, warnings, folder, metrics)


class _Passing:
    """Tells a listener of blocks that are only passed: what their rows say happened in the run."""

    def __init__(self, listener: Listener) -> None:
        self._listener, self._since = listener, time.perf_counter()

    def started(self, blocks: int, done: int) -> None:
        """No block has been passed yet, though all were written."""
        self._listener.started(blocks, 0)

    def block(self, index: int, row: Mapping[str, Any]) -> None:
        """A block is passed."""
        now = time.perf_counter()
        told = {"unit": row["unit"], "seconds": now - self._since, "error": None, "layers": {}, "tuning": None}
        self._since = now
        self._listener.block(index, told)

    def phase(self, text: str) -> None:
        """What is going on now."""
        self._listener.phase(text)
