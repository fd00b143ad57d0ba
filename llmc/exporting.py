"""Other formats of a finished run: written from the codes and scales that it stored, without calibrating again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .algorithms import Recipe
from .config.suggest import did_you_mean
from .errors import ExportError
from .export import EXPORTERS, Exporter, Layer
from .finished import OTHER_MODEL, FinishedSink, prepare_again, read_metrics, selection_of, sink_of
from .models import BlockSelection
from .models.mixture import in_solving_order
from .outputs import stored_config, stored_source
from .prepare import Prepared, check_exporters, source_of
from .quant import InputRange, KvRanges, QuantSpec, QWeight, Scheme, UnitRecord, cache_scales
from .report.page import refresh_report
from .stream.files import sync_folder, write_json
from .stream.skeleton import EMBED, HEAD, block_unit
from .surveying import kept_layers
from .translate import exporters_of
from .workspace import CONFIG, METRICS, Workspace


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        outputs: for each format its folder, size and the command that serves it.
        source: the folder that the codes were read from.
        original_bytes: size of the original model's tensors.
        warnings: what holds only under a condition, and why the run's report wasn't written again.
    """

    outputs: dict[str, dict[str, Any]]
    source: Path
    original_bytes: int
    warnings: list[str]


def export(run: Path, targets: Sequence[str], model: str | None = None) -> Exported:
    """Write further formats into the folder of a finished run, one shard in memory at a time.

    The files are those that the run would have written itself. A folder is complete when it has a ``config.json``,
    which comes last; one that isn't is begun anew. The run's report, where it has one, is written again.

    Args:
        run: the ``save_path`` of the run.
        targets: keys of the section ``save``, with ``save_`` or without.
        model: the original checkpoint, where it isn't any more where the run found it.

    Raises:
        LlmcError: the run isn't finished, holds no codes, or a format can't store them. Nothing has been written.
    """
    kinds = [_kind(name) for name in dict.fromkeys(targets)]
    metrics = read_metrics(run)
    for kind in kinds:
        if kind.name in metrics["outputs"]:
            raise ExportError(f"{run / kind.folder} is there already", "remove the folder and its entry, or keep it")
    finished = _Finished.read(run, metrics, model)
    jobs = [_job(finished, kind) for kind in kinds]
    warnings = [warning for job in jobs for warning in job.warnings]
    for job in jobs:
        job.check_scales(finished)
    rows: list[dict[str, Any]] = []
    sinks = [finished.sink(job.exporter) for job in jobs]
    for job, sink in zip(jobs, sinks, strict=True):
        _begin(run / job.exporter.folder)
        sink.folder.mkdir(exist_ok=True)
    for unit in finished.units:
        record = finished.record(unit)
        written = {
            job.exporter.name: sink.write(unit, job.convert(record)) for job, sink in zip(jobs, sinks, strict=True)
        }
        rows.append({"kind": "unit", "unit": unit, "outputs": written})
    outputs, workspace = {}, Workspace(run, "add", {})
    config = stored_config(finished.prepared, finished.selection)
    source = stored_source(finished.prepared, finished.selection)
    for job, sink in zip(jobs, sinks, strict=True):
        layers = kept_layers(job.layers, finished.selection)
        output = workspace.finish_output(job.exporter, sink, source, config, layers, rows)
        if job.exporter.assembled:
            shutil.rmtree(sink.folder)
        outputs[job.exporter.name] = metrics["outputs"][job.exporter.name] = output
    write_json(run / METRICS, metrics)
    warnings += refresh_report(run)
    return Exported(outputs, finished.source.folder, metrics["model"]["bytes"], warnings)


def _kind(name: str) -> type[Exporter]:
    known = {kind.name: kind for kind in EXPORTERS}
    full = name if name.startswith("save_") else f"save_{name}"
    if full not in known:
        short = [key.removeprefix("save_") for key in known]
        raise ExportError(
            f"--to {name}: there is no such format{did_you_mean(name, short)}", f"there are {', '.join(short)}"
        )
    return known[full]


@dataclass(frozen=True)
class _Finished:
    """A finished run: what was known before it began, and what it left.

    Attributes:
        folder: its ``save_path``.
        prepared: everything that follows from its configuration and the original's headers.
        selection: the blocks that it kept.
        rows: what ``metrics.json`` says of each of those.
        source: a folder from which codes can be read.
    """

    folder: Path
    prepared: Prepared
    selection: BlockSelection
    rows: Mapping[str, Mapping[str, Any]]
    source: FinishedSink

    @classmethod
    def read(cls, folder: Path, metrics: Mapping[str, Any], model: str | None) -> _Finished:
        """Prepare the run's configuration again, and find a folder with codes.

        Raises:
            LlmcError: the original model is gone or another one, or no folder has codes.
        """
        prepared = prepare_again(metrics, model)
        selection = selection_of(metrics, prepared)
        rows = {row["unit"]: row for row in metrics["blocks"]}
        models = [kind for kind in EXPORTERS if kind.stores_weights and not kind.transformed_only]
        written = [kind for kind in models if kind.name in metrics["outputs"]]
        for kind in written:
            exporter = _exporter(kind, prepared, prepared.recipe, prepared.layers)
            found = cls(folder, prepared, selection, rows, sink_of(folder, exporter, selection))
            if found.has_codes():
                return found
        raise ExportError(
            f"{folder} holds no codes and scales, only {', '.join(metrics['outputs']) or 'numbers'}",
            "formats are made from codes: run it again with what you need, such as save.save_vllm: True",
        )

    @property
    def units(self) -> list[str]:
        """Everything that has a shard, in order."""
        return [EMBED, *(block_unit(index) for index in self.selection.kept), HEAD]

    def sink(self, exporter: Exporter) -> FinishedSink:
        """The folder of a format in this run's."""
        return sink_of(self.folder, exporter, self.selection)

    def has_codes(self) -> bool:
        """Whether the source's first block and what is in front of it give back the codes of all quantized Linears."""
        unit = block_unit(self.selection.kept[0])
        if not all(self.source.shard(one).is_file() for one in (EMBED, unit)):
            return False
        front = [layer for layer in self.prepared.layers if layer.outside]
        own = {EMBED: front, unit: [layer for layer, _ in self._block(unit)]}
        wanted = {one: [layer.name for layer in layers if layer.spec is not None] for one, layers in own.items()}
        return all(not names or self.source.read(one).quantized.keys() >= set(names) for one, names in wanted.items())

    def record(self, unit: str) -> UnitRecord:
        """A unit as the run had it, with the ranges that it calibrated.

        Raises:
            RunError: its file is missing or damaged.
            ExportError: it isn't a part of this model.
        """
        read, row = self.source.read(unit), self.rows.get(unit)
        for name, weight in read.quantized.items():
            shape = self.prepared.entries[f"{name}.weight"].shape
            if tuple(weight.codes.shape) != shape:
                raise ExportError(f"{name} has the shape {tuple(weight.codes.shape)}, not {shape}", OTHER_MODEL)
        if row is None:
            return read
        return replace(read, inputs=self._inputs(unit, row), cache=self._cache(unit, row))

    def _block(self, unit: str) -> list[tuple[Layer, str]]:
        """The Linears of a block with the keys of their subsets."""
        index = int(unit.rpartition("-")[2])
        own = self.prepared.subsets[index]
        key_of = {name: subset.key for subset in in_solving_order(own) for name in subset.linears}
        keys = [key_of[name] for subset in own for name in subset.linears]
        start = sum(len(subset.linears) for own in self.prepared.subsets[:index] for subset in own)
        return list(zip(self.prepared.layers[start : start + len(keys)], keys, strict=True))

    def _inputs(self, unit: str, row: Mapping[str, Any]) -> dict[str, InputRange]:
        """Formats store what follows from a range; the range itself stands in ``metrics.json``."""
        ranges = row["inputs"]
        return {
            layer.name: InputRange(*ranges[key])
            for layer, key in self._block(unit)
            if key in ranges and layer.act is not None
        }

    def _cache(self, unit: str, row: Mapping[str, Any]) -> dict[str, Tensor]:
        kv, found = self.prepared.recipe.kv, row["cache_ranges"]
        if kv is None or found is None:
            return {}
        own = self.prepared.subsets[int(unit.rpartition("-")[2])]
        key = next(subset.key for subset in own if subset.reads == "heads")
        linear = next(layer.name for layer, of in self._block(unit) if of == key)
        scales = cache_scales(kv, KvRanges(tuple(found["key"]), tuple(found["value"])))
        return {f"{linear.rpartition('.')[0]}.{name}": scale for name, scale in scales.items()}


def _exporter(kind: type[Exporter], prepared: Prepared, recipe: Recipe, layers: Sequence[Layer]) -> Exporter:
    compute = prepared.skeleton.model.dtype
    return exporters_of([kind], recipe, layers, prepared.stored, compute, prepared.layout)[0]


# --- one format ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """A format to be written.

    Attributes:
        exporter: the format.
        layers: the Linears with the grids as it stores them.
        moves: whether it stores packed integers' scales, or its backend multiplies them, in another dtype than the run.
        warnings: what its backend loads only under a condition.
    """

    exporter: Exporter
    layers: list[Layer]
    moves: bool
    warnings: list[str] = field(default_factory=list)

    def check_scales(self, finished: _Finished) -> None:
        """Refuse scales that the format's dtype can't hold, before anything is written.

        Raises:
            ExportError: names one.
        """
        if self.moves:
            for unit in finished.units:
                self.convert(finished.record(unit))

    def convert(self, record: UnitRecord) -> UnitRecord:
        """The record with scales in the format's dtype."""
        if not self.moves:
            return record
        moved = {name: self._moved(name, weight) for name, weight in record.quantized.items()}
        return replace(record, quantized=moved)

    def _moved(self, name: str, weight: QWeight) -> QWeight:
        target = self.exporter.scheme_of(name).weight
        if target is None or not _is_packed(self.exporter.scheme_of(name)):
            return weight
        scale = weight.scale.to(target.scale_dtype)
        wrong = scale.double() != weight.scale.double()
        if bool(wrong.any()):
            example = float(weight.scale[wrong][0])
            wanted, stored = (str(dtype).removeprefix("torch.") for dtype in (scale.dtype, weight.scale.dtype))
            raise ExportError(
                f"{name}: {self.exporter.name} stores scales in {wanted}, which has no {example!r} ({stored}); "
                "rounding it now would make another model than was evaluated",
                f"next time set save.{self.exporter.name}: True, or quant.weight.scale_dtype: {wanted}, in the run",
            )
        spec = replace(weight.spec, scale_dtype=target.scale_dtype, exact_product=target.exact_product)
        return replace(weight, scale=scale, spec=spec)


def _job(finished: _Finished, kind: type[Exporter]) -> _Job:
    """Check a format against the run's schemes.

    Raises:
        ExportError: it can't store them.
    """
    prepared = finished.prepared
    if kind.wants_squares:
        raise ExportError(
            f"{kind.name} is made while calibration text goes through the model, and nothing of that is kept",
            f"next time set {kind.name}: True in the run itself",
        )
    if kind.transformed_only and any(layer.spec is not None for layer in prepared.layers):
        raise ExportError(
            f"{kind.name} holds weights before they are rounded, and the run kept only what came out",
            f"next time set {kind.name}: True in the run itself",
        )
    recipe, layers = prepared.recipe, prepared.layers
    packed = {layer.spec for layer in layers if layer.spec is not None and _is_packed(layer.scheme)}
    moved = {_moved_spec(spec, kind) for spec in packed}
    warnings: list[str] = []
    if moved != packed:
        recipe, layers = _moved_recipe(recipe, kind), [_moved_layer(layer, kind) for layer in layers]
        warnings.append(
            f"{kind.name}: the codes and scales are the run's; their products, which it evaluated in "
            f"{_products(packed)}, are rounded to {_products(moved)} by whoever loads them"
        )
    exporter, source = _exporter(kind, prepared, recipe, layers), source_of(prepared.folder, prepared.skeleton)
    warnings += check_exporters(recipe, recipe.online(prepared.frame), [exporter], layers, source)
    return _Job(exporter, layers, moved != packed, warnings)


def _products(specs: set[QuantSpec]) -> str:
    return " and ".join(sorted({str(spec.product_dtype).removeprefix("torch.") for spec in specs}))


def _is_packed(scheme: Scheme) -> bool:
    """Whether these are packed, weight-only integers, whose scales have the dtype that a format wants."""
    return scheme.weight is not None and scheme.weight.grid == "int" and scheme.act is None


def _moved_spec(spec: QuantSpec, kind: type[Exporter]) -> QuantSpec:
    """A grid of packed integers as a format stores and its backend multiplies it."""
    exact = kind.exact_product if kind.stores_codes else spec.exact_product
    return replace(spec, scale_dtype=kind.scale_dtype or spec.scale_dtype, exact_product=exact)


def _moved_scheme(scheme: Scheme, kind: type[Exporter]) -> Scheme:
    if scheme.weight is None or not _is_packed(scheme):
        return scheme
    return replace(scheme, weight=_moved_spec(scheme.weight, kind))


def _moved_layer(layer: Layer, kind: type[Exporter]) -> Layer:
    return replace(layer, spec=_moved_scheme(layer.scheme, kind).weight)


def _moved_recipe(recipe: Recipe, kind: type[Exporter]) -> Recipe:
    rules = tuple(replace(rule, scheme=_moved_scheme(rule.scheme, kind)) for rule in recipe.rules)
    return replace(recipe, spec=_moved_scheme(recipe.scheme, kind).weight, rules=rules)


def _begin(folder: Path) -> None:
    """An empty folder. What an export left that was killed never looks finished meanwhile."""
    (folder / CONFIG).unlink(missing_ok=True)
    if folder.exists():
        sync_folder(folder)
        shutil.rmtree(folder)
    folder.mkdir()
