"""The folders that a run writes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .export import Exporter, Layer, Source, check_shard, read_config, with_own_head, without_quantization
from .export.dense import FakeQuant, Transformed
from .measuring import Measuring
from .models import BlockSelection
from .prepare import Prepared
from .stream.journal import Journal
from .stream.sink import Sink
from .stream.skeleton import EMBED, HEAD, block_unit
from .translate import mixed_schemes
from .workspace import Workspace


def make_sinks(
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


def finish_outputs(
    prepared: Prepared,
    workspace: Workspace,
    sinks: list[Sink],
    journal: Journal,
    layers: list[Layer],
    selection: BlockSelection,
) -> dict[str, dict[str, Any]]:
    """Make the folders of what all blocks were written to; of each format what is to be said of its folder."""
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
