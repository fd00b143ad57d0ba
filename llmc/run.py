"""A run from its configuration to its result. With ``prepare.py`` the only file that knows every package."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .analyzing import analysis_plan, finish_analysis
from .budget.budgeting import Spending, ready
from .budget.sensing import settled_by_measuring
from .config import LoadedConfig
from .configuring import load_config
from .describing import describe, versions
from .encoding import compress_encoder
from .errors import LlmcError, RunError
from .eval.measure import Evaluated
from .eval.perplexity import Perplexity
from .measuring import Measuring
from .outputs import finish_outputs, make_sinks
from .passing import make_engine
from .plan import bits_per_weight, forward_of, free_disk
from .prepare import Prepared
from .report.metrics import Measured, make_metrics, with_evaluations
from .report.page import finish_report
from .stream.activations import ActivationStore
from .stream.files import write_json
from .stream.headers import headers_digest
from .stream.memory import peak_host_memory, share_heap
from .stream.options import Batches, EngineOptions, Listener, Silent
from .stream.source import BlockSource
from .surveying import host_memory, kept_layers, survey
from .tasking import Answered, run_jobs
from .workspace import METRICS, Workspace, tokens_digest

_TUNING = ("host_memory_gb", "checkpoint_every", "threads", "forward", "experts")  # of base: no influence on the result


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    Attributes:
        save_path: the run's folder, or None if nothing was saved.
        outputs: for each ``save_*`` its folder, size and the command that serves it.
        evaluations: measured numbers.
        metrics: the content of ``metrics.json``.
        answers: what tasks and prompts found.
        report: the HTML report, if one was written.
        warnings: what went wrong behind the end of the run, and doesn't touch its results.
    """

    save_path: Path | None
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluations: list[Evaluated] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    answers: list[Answered] = field(default_factory=list)
    report: Path | None = None
    warnings: tuple[str, ...] = ()

    @property
    def perplexities(self) -> list[Perplexity]:
        """The perplexities among them, by prefill and by decoding."""
        return [one for one in self.evaluations if isinstance(one, Perplexity)]


def compress(
    config: Path | str | Mapping[str, Any] | LoadedConfig,
    overrides: Sequence[str] = (),
    *,
    listener: Listener | None = None,
) -> Result:
    """Run a configuration: calibrate, compress, evaluate and write, one block at a time.

    Args:
        config: path of a YAML file, its content, or a loaded configuration.
        overrides: ``key.path=value`` each.
        listener: hears of progress.

    Raises:
        LlmcError: bad input; nothing has been written unless the message says so.
    """
    loaded = config if isinstance(config, LoadedConfig) else load_config(config, overrides)
    prepared, spending = ready(loaded)
    return run(prepared, listener or Silent(), spending)


def run(prepared: Prepared, listener: Listener, spending: Spending | None = None) -> Result:
    """Do what ``ready`` has checked; ``spending`` is the budget that schemes are chosen out of, if there is one."""
    started = time.perf_counter()
    share_heap()
    save_path = prepared.config.save.save_path
    with ExitStack() as stack:
        # Without a folder to resume from, a run's state is worth nothing after it.
        kept = save_path is not None and prepared.changes
        folder = save_path if kept and save_path else stack.enter_context(tempfile.TemporaryDirectory())
        root = Path(folder).expanduser()
        workspace = Workspace(root, prepared.config.save.on_existing if kept else None, _fingerprint(prepared))
        _check_disk(prepared, workspace)
        journal = workspace.open()
        checkpoint = prepared.checkpoint
        source = BlockSource(checkpoint.units(prepared.skeleton.units), checkpoint.decode)
        stack.callback(source.close)
        settled, begun = None if spending is None else spending.settled, time.perf_counter()
        if spending is not None and settled is None:
            settled = settled_by_measuring(prepared, spending.budget, source, root, journal, listener.phase, keep=kept)
            prepared = settled.prepared
        chosen_in = {} if spending is None else {"sensitivity": time.perf_counter() - begun}
        surveyed = survey(prepared, source, workspace, journal, listener)
        selection = surveyed.selection
        encoded = compress_encoder(prepared, workspace, listener)
        measuring = Measuring(prepared.evaluations, prepared.recipe.kv)
        sinks, transformed = make_sinks(prepared, workspace, selection, measuring, keep_records=kept)
        store = ActivationStore(workspace.state, host_memory(prepared))
        outcome = make_engine(
            prepared,
            source,
            store,
            journal,
            EngineOptions(
                forward=forward_of(prepared.config.base.forward, prepared.estimate.held, prepared.device),
                checkpoint_every=prepared.config.base.checkpoint_every,
            ),
            listener,
            sinks=sinks,
            transformed=transformed,
            dropped=selection.dropped,
            calib=Batches(prepared.calib),
            evaluation=measuring.prefilled,
            decoding=measuring.decoded,
            analysis=analysis_plan(prepared, selection, workspace.state if kept else None),
            front=encoded.front,
        ).run()
        layers = kept_layers(prepared.layers, selection)
        evaluations = measuring.results()
        written = [*sinks, *([transformed] if transformed else [])]
        outputs = finish_outputs(prepared, workspace, written, journal, layers, selection)
        measured = Measured(
            seconds=time.perf_counter() - started,
            by_kind=chosen_in | surveyed.seconds | encoded.seconds | outcome.seconds,
            bytes_read=outcome.bytes_read + encoded.bytes_read,
            peak_host=peak_host_memory(),
            peak_device=outcome.peak_device,
        )
        metrics = make_metrics(
            describe(prepared),
            measured,
            bits=bits_per_weight(layers),
            budget=settled.to_dict(spending.budget.asked) if settled and spending else None,
            influence=surveyed.to_dict(),
            encoder=encoded.to_dict(),
            evaluations=evaluations,
            outputs=outputs,
            rows=journal.rows,
            analysis=finish_analysis(prepared, workspace.state, workspace.path),
        )
        store.drop_mapped()
        if kept:
            workspace.finish(metrics, {row["unit"]: row["clusters"] for row in journal.rows if row.get("clusters")})
        result = _with_answers(prepared, Result(root if kept else None, outputs, evaluations, metrics), listener)
        return _with_report(prepared, result)


def _check_disk(prepared: Prepared, workspace: Workspace) -> None:
    """Refuse what won't fit on the disk, less what an interrupted run has already written."""
    needed, free = prepared.estimate.disk - workspace.taken(), free_disk(workspace.path)
    if needed > free:
        raise RunError(
            f"not enough disk for {workspace.path}: about {needed / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free",
            "free some, name another save.save_path, or save fewer formats",
        )


class _Phases(Silent):
    """A listener that hears what goes on once the blocks are finished, and nothing more of them."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def phase(self, text: str) -> None:
        """Pass it on."""
        self._listener.phase(text)


def _with_answers(prepared: Prepared, result: Result, listener: Listener) -> Result:
    """The result with what tasks and prompts found, which are asked of what a finished run has written."""
    if not prepared.jobs:
        return result
    try:
        answers = run_jobs(prepared, result.save_path, _Phases(listener))
    except LlmcError as problem:
        where = "" if result.save_path is None else f" and written ({result.save_path})"
        raise RunError(f"the run is done{where}, but not its tasks: {problem.message}", problem.remedy) from problem
    metrics = with_evaluations(result.metrics, [one.to_dict() for one in answers])
    if result.save_path is not None:
        write_json(result.save_path / METRICS, metrics)
    return replace(result, answers=answers, metrics=metrics)


def _with_report(prepared: Prepared, result: Result) -> Result:
    """The result with a page for people, if they want one."""
    if result.save_path is None or not prepared.config.report.html:
        return result
    report, warnings = finish_report(result.save_path)
    return replace(result, report=report, warnings=warnings)


def _fingerprint(prepared: Prepared) -> dict[str, str]:
    """Everything that the result depends on, by a name that a message can use."""
    resolved = json.loads(json.dumps(prepared.loaded.resolved))
    for key in _TUNING:
        resolved.get("base", {}).pop(key, None)
    resolved.get("save", {}).pop("on_existing", None)
    resolved.get("save", {}).pop("save_path", None)
    resolved.get("report", {}).pop("html", None)
    return {
        "configuration": json.dumps(resolved, sort_keys=True),
        "calibration text": tokens_digest([tensor for batch in prepared.calib for tensor in batch.tensors]),
        "evaluation text": tokens_digest([one.windows.tokens for one in prepared.evaluations]),
        "checkpoint": headers_digest(prepared.checkpoint.stored) + prepared.checkpoint.says,
        "set of library versions": json.dumps(versions(), sort_keys=True),
    }
