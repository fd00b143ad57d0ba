"""A run from its configuration to its result. With ``prepare.py`` the only file that knows every package."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import __version__
from .analyzing import analysis_plan, finish_analysis
from .budget.budgeting import Spending, ready
from .budget.sensing import settled_by_measuring
from .config import LoadedConfig
from .configuring import load_config
from .encoding import compress_encoder
from .errors import LlmcError, RunError
from .eval.measure import Evaluated
from .eval.perplexity import Perplexity
from .export import Exporter, Layer, Source, check_shard, read_config, with_own_head, without_quantization
from .export.dense import FakeQuant, Transformed
from .measuring import Measuring
from .models import BlockSelection
from .passing import make_engine
from .plan import bits_per_weight, forward_of, free_disk, original_bytes
from .prepare import Prepared
from .quant import Scheme
from .report.metrics import Measured, make_metrics, with_evaluations
from .report.page import finish_report
from .stream.activations import ActivationStore
from .stream.files import write_json
from .stream.headers import headers_digest
from .stream.journal import Journal
from .stream.memory import give_back_memory, peak_host_memory, share_heap
from .stream.options import Batches, EngineOptions, Listener, Silent
from .stream.sink import Sink
from .stream.skeleton import EMBED, HEAD, block_unit
from .stream.source import BlockSource
from .surveying import host_memory, kept_layers, survey
from .tasking import Answered, run_jobs
from .translate import mixed_schemes
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
    give_back_memory()  # of the tokenizer
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
        sinks, transformed = _sinks(prepared, workspace, selection, measuring, keep_records=kept)
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
        outputs = _finish_outputs(prepared, workspace, written, journal, layers, selection)
        measured = Measured(
            seconds=time.perf_counter() - started,
            by_kind=chosen_in | surveyed.seconds | encoded.seconds | outcome.seconds,
            bytes_read=outcome.bytes_read + encoded.bytes_read,
            peak_host=peak_host_memory(),
            peak_device=outcome.peak_device,
        )
        act = prepared.recipe.act or prepared.recipe.clustered
        metrics = make_metrics(
            config=prepared.loaded.resolved,
            versions=versions(),
            model=_described(prepared),
            scheme=None if prepared.recipe.spec is None else prepared.recipe.spec.to_dict(),
            sparsity=None if prepared.recipe.sparsity is None else asdict(prepared.recipe.sparsity),
            activations=None if act is None else act.to_dict(),
            mixed=_mixed(prepared),
            kv_scheme=_kv_scheme(prepared),
            bits=bits_per_weight(layers),
            budget=settled.to_dict(spending.budget.asked) if settled and spending else None,
            influence=surveyed.to_dict(),
            encoder=encoded.to_dict(),
            evaluations=evaluations,
            outputs=outputs,
            rows=journal.rows,
            calibration_tokens=sum(batch.tokens.numel() for batch in prepared.calib),
            analysis=finish_analysis(prepared, workspace.state, workspace.path),
            measured=measured,
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


def _described(prepared: Prepared) -> dict[str, Any]:
    """The model, for the metrics."""
    return {
        "path": str(prepared.folder),
        "adapter": prepared.adapter.name,
        "blocks": len(prepared.skeleton.blocks),
        "bytes": original_bytes(prepared.checkpoint),
        "input": prepared.checkpoint.says or None,
        "computing_dtype": str(prepared.skeleton.model.dtype).removeprefix("torch."),
        "device": str(prepared.device),
    }


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


# --- parts of a run ------------------------------------------------------------------------------------------------


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


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("torch", "transformers", "compressed-tensors", "safetensors", "tokenizers", "scikit-learn", "scipy")
    return {"llmc": __version__, **{name: version(name) for name in packages}}


def _sinks(
    prepared: Prepared, workspace: Workspace, selection: BlockSelection, measuring: Measuring, *, keep_records: bool
) -> tuple[list[Sink], Sink | None]:
    """Folders for the compressed model, and the one for the transformed model if somebody needs it.

    A resumed run reads the blocks that it has written. If no compressed model is to be saved, it's kept in the state.
    """
    units = [EMBED, *(block_unit(index) for index in selection.kept), HEAD]

    def sink(exporter: Exporter, folder: Path) -> Sink:
        folder.mkdir(parents=True, exist_ok=True)
        return Sink(folder, exporter, units, partial(_verify, exporter, selection), selection)

    sinks = [sink(e, workspace.shards(e)) for e in prepared.exporters if not e.transformed_only]
    transformed = [sink(e, workspace.shards(e)) for e in prepared.exporters if e.transformed_only]
    compute, recipe = prepared.skeleton.model.dtype, prepared.recipe
    if keep_records and not any(e.stores_weights for e in prepared.exporters if not e.transformed_only):
        kept = FakeQuant(recipe.spec, prepared.stored, compute, schemes=mixed_schemes(recipe, prepared.layers))
        sinks = [sink(kept, workspace.state / "compressed"), *sinks]
    if keep_records and not transformed and "transformed" in measuring.states:
        transformed = [sink(Transformed(recipe.spec, prepared.stored, compute), workspace.state / "transformed")]
    return sinks, transformed[0] if transformed else None


def _verify(exporter: Exporter, selection: BlockSelection, path: Path, record: Any) -> None:
    check_shard(path, exporter, record, selection.original)


def _kv_scheme(prepared: Prepared) -> dict[str, Any] | None:
    """The KV cache's grid with the bits that an element takes in it, scales included."""
    kv = prepared.recipe.kv
    if kv is None:
        return None
    return kv.to_dict() | {"bits_per_element": kv.bits_an_element(prepared.heads.kv, prepared.heads.dim)}


def _mixed(prepared: Prepared) -> list[dict[str, Any]]:
    """The schemes of ``quant.mix_bits`` with the Linears that they were used for."""
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in mixed_schemes(prepared.recipe, prepared.layers).items():
        by_scheme.setdefault(scheme, []).append(name)
    return [{**scheme.to_dict(), "layers": names} for scheme, names in by_scheme.items()]


def _finish_outputs(
    prepared: Prepared,
    workspace: Workspace,
    sinks: list[Sink],
    journal: Journal,
    layers: list[Layer],
    selection: BlockSelection,
) -> dict[str, dict[str, Any]]:
    outputs = {}
    original, source = stored_config(prepared, selection), stored_source(prepared, selection)
    rows = [row for row in journal.rows if row["kind"] == "unit"]
    by_name = {exporter.name: exporter for exporter in prepared.exporters}
    for sink in sinks:
        exporter = by_name.get(sink.format.name)
        if exporter is not None:
            outputs[exporter.name] = workspace.finish_output(exporter, sink, source, original, layers, rows)
    return outputs


def stored_config(prepared: Prepared, selection: BlockSelection) -> dict[str, Any]:
    """``config.json`` of the model that is stored, before a format has its say."""
    original = without_quantization(read_config(prepared.folder))
    original = with_own_head(original) if prepared.frame is not None else original
    return selection.config(original, prepared.skeleton.model.config.get_text_config())


def stored_source(prepared: Prepared, selection: BlockSelection) -> Source:
    """Where the tokenizer of what is stored is, and its configuration with all defaults."""
    model = prepared.skeleton.model.config.get_text_config()
    complete = model.to_dict() if prepared.frame is None else with_own_head(model.to_dict())
    return Source(prepared.folder, selection.config(complete, model), images=prepared.skeleton.images is not None)
