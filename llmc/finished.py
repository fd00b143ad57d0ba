"""A finished run: what ``metrics.json`` says of it, its configuration prepared again, and its shards."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .configuring import load_config
from .errors import RunError
from .evaluating import Evaluable
from .export import Exporter, check_shard
from .models import BlockSelection
from .plan import original_bytes
from .prepare import Prepared, prepare
from .quant import UnitRecord
from .report.metrics import READABLE
from .stream.sink import Sink
from .stream.skeleton import EMBED, HEAD, block_unit
from .workspace import CLUSTERS, METRICS, is_unfinished

PARTS = "parts"  # of the one file that a format is
OTHER_MODEL = "the model isn't the one that the run compressed: name that with --model, for eval as model.path"
_AGAIN = "--from takes the save_path of a finished run"
_NEEDED = {"config", "model", "outputs", "blocks", "blocks_dropped", "evaluation"}
_NEEDED_OF_BLOCKS = {"unit", "inputs", "cache_ranges"}


def read_metrics(run: Path) -> dict[str, Any]:
    """``metrics.json`` of a finished run. Schema 1 has all that is needed to go on with the run, so it's read too.

    Raises:
        RunError: the run isn't finished, or this isn't what a version of llmc writes that this one knows.
    """
    if is_unfinished(run):
        raise RunError(f"{run} holds a run that isn't finished", "run its command again, it goes on where it was")
    try:
        metrics = json.loads((run / METRICS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{run} has no {METRICS}", _AGAIN) from None
    except (ValueError, OSError) as problem:
        raise RunError(f"{run / METRICS} can't be read: {problem}", _AGAIN) from problem
    schema = metrics.get("schema") if isinstance(metrics, dict) else None
    if isinstance(schema, int) and schema not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise RunError(
            f"{run / METRICS} has schema {schema}, and this version of llmc reads {known}",
            f"use the version that wrote it: llmc {metrics.get('versions', {}).get('llmc', '(not named)')}",
        )
    if not isinstance(metrics, dict) or not _is_ours(metrics):
        raise RunError(f"{run / METRICS} isn't what llmc writes", _AGAIN)
    return metrics


def _is_ours(metrics: Mapping[str, Any]) -> bool:
    known = metrics.get("schema") in READABLE and metrics.keys() >= _NEEDED
    return known and all(row.keys() >= _NEEDED_OF_BLOCKS for row in metrics["blocks"])


def prepare_again(
    metrics: Mapping[str, Any],
    model: str | None = None,
    *,
    base: Mapping[str, Any] | None = None,
    evaluations: list[Any] | None = None,
) -> Prepared:
    """The run's configuration once more, with its computing dtype and without its calibration text.

    Args:
        metrics: of the run.
        model: the original checkpoint, where it isn't any more where the run found it.
        base: keys of the section ``base`` to take instead of the run's; None: on the CPU.
        evaluations: what to evaluate instead of what the run did; None: nothing, and without a tokenizer.

    Raises:
        LlmcError: the original model is gone or another one.
    """
    config = json.loads(json.dumps(metrics["config"]))
    config["model"] |= {"path": model or metrics["model"]["path"], "torch_dtype": metrics["model"]["computing_dtype"]}
    config["base"] |= {"device": "cpu", "threads": None} if base is None else base
    if evaluations is not None:
        config["eval"] = evaluations
    texts = frozenset({"eval"}) if evaluations is not None else frozenset()
    prepared = prepare(load_config(config), texts=texts)
    found, wanted = original_bytes(prepared.checkpoint), metrics["model"]["bytes"]
    if found != wanted or len(prepared.skeleton.blocks) != metrics["model"]["blocks"]:
        raise RunError(f"{prepared.folder} holds {found} bytes of weights, the run read {wanted}", OTHER_MODEL)
    return prepared


def selection_of(metrics: Mapping[str, Any], prepared: Prepared) -> BlockSelection:
    """The blocks that the run kept."""
    dropped = (metrics["blocks_dropped"] or {"dropped": []})["dropped"]
    return prepared.skeleton.selection(frozenset(dropped))


class FinishedSink(Sink):
    """Shards of a finished run. No journal speaks of them any more: they are what is there."""

    def read(self, unit: str, written: Mapping[str, Any] | None = None) -> UnitRecord:
        """Read a unit.

        Raises:
            RunError: its file is missing or damaged.
        """
        try:
            return self.load(unit)
        except (OSError, SafetensorError, KeyError) as problem:
            raise RunError(
                f"{self.shard(unit)} can't be read: {problem}",
                f"python -m llmc verify {self.folder} says more; the run must be done again",
            ) from problem


def sink_of(folder: Path, exporter: Exporter, selection: BlockSelection) -> FinishedSink:
    """The shards of a format in a run's folder."""

    def check(path: Path, record: UnitRecord) -> None:
        check_shard(path, exporter, record, selection.original)

    shards = folder / exporter.folder / (PARTS if exporter.assembled else "")
    units = [EMBED, *(block_unit(index) for index in selection.kept), HEAD]
    return FinishedSink(shards, exporter, units, check, selection)


def open_finished(folder: Path, metrics: Mapping[str, Any], prepared: Prepared) -> Evaluable:
    """What a run has written, to be gone through again: its own formats, in a resumed run's order.

    Args:
        folder: of the run.
        metrics: of the run.
        prepared: its configuration, prepared again.

    Raises:
        RunError: what the run kept isn't enough to go through the compressed model.
    """
    selection = selection_of(metrics, prepared)
    first = block_unit(selection.kept[0])
    sinks = {
        one.name: sink_of(folder, one, selection)
        for one in prepared.exporters
        if one.stores_weights and one.name in metrics["outputs"]
    }
    there = {name: sink for name, sink in sinks.items() if sink.shard(first).is_file()}
    transformed = next(
        (there[one.name] for one in prepared.exporters if one.transformed_only and one.name in there), None
    )
    written = next((sink for sink in there.values() if sink is not transformed), None)
    rows = {row["unit"]: row for row in metrics["blocks"]}
    if written is None:
        raise RunError(
            f"{folder} holds no weights that can be read back, only {', '.join(metrics['outputs']) or 'numbers'}",
            "next time set save.save_fake: True, say, in the run itself",
        )
    if prepared.recipe.clusters:
        clusters = _read_clusters(folder / CLUSTERS, rows)
        rows = {unit: {**row, "clusters": clusters[unit]} for unit, row in rows.items()}
    return Evaluable(prepared, written, transformed, rows, selection.dropped)


def _read_clusters(file: Path, units: Collection[str]) -> dict[str, Any]:
    """Of each block, what rounds tensors inside it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["schema"] != 1:
            raise ValueError(f"it has schema {content['schema']}, not 1")
        return {unit: content["blocks"][unit] for unit in units}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise RunError(
            f"{file} is missing or damaged ({problem}): without its clusters the run's model can't be gone through",
            "do the run again, or evaluate in it",
        ) from problem
