"""A run from its configuration to its result. With ``prepare.py`` the only file that knows every package."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .algorithms import options_types
from .config import LoadedConfig, load_config
from .encoding import compress_encoder
from .errors import RunError
from .eval.perplexity import Perplexity, mean_losses, perplexity
from .export import Exporter, Layer, Source, check_shard, read_config, with_own_head, without_quantization
from .export.dense import FakeQuant, Transformed
from .models import BlockSelection
from .plan import bits_per_weight, forward_of, free_disk, original_bytes
from .prepare import Prepared, positions_of, prepare, state_of
from .quant import Scheme
from .report.metrics import Measured, make_metrics
from .stream.activations import ActivationStore
from .stream.batch import Batch
from .stream.engine import Engine
from .stream.front import CompressedFront
from .stream.headers import headers_digest
from .stream.journal import Journal
from .stream.memory import give_back_memory, share_heap
from .stream.options import Batches, EngineOptions, Listener
from .stream.sink import Sink
from .stream.skeleton import EMBED, HEAD, block_unit
from .stream.source import BlockSource
from .surveying import host_memory, kept_layers, survey
from .translate import mixed_schemes
from .workspace import Workspace, tokens_digest

_TUNING = ("host_memory_gb", "checkpoint_every", "threads", "forward", "experts")  # of base: no influence on the result


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    Attributes:
        save_path: the run's folder, or None if nothing was saved.
        outputs: for each ``save_*`` its folder, size and the command that serves it.
        perplexities: measured numbers.
        metrics: the content of ``metrics.json``.
    """

    save_path: Path | None
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    perplexities: list[Perplexity] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)


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
    loaded = config if isinstance(config, LoadedConfig) else load_config(config, overrides, options_types())
    return run(prepare(loaded), listener or Silent())


class Silent:
    """A listener that doesn't care."""

    def started(self, blocks: int, done: int) -> None:
        """Ignore."""

    def block(self, index: int, row: Mapping[str, Any]) -> None:
        """Ignore."""

    def phase(self, text: str) -> None:
        """Ignore."""


def run(prepared: Prepared, listener: Listener) -> Result:
    """Do what ``prepare`` has checked."""
    started = time.perf_counter()
    share_heap()
    give_back_memory()  # of the tokenizer
    save_path = prepared.config.save.save_path
    with ExitStack() as stack:
        # Without a folder to resume from, a run's state is worth nothing after it.
        kept = save_path is not None and prepared.changes
        root = (
            Path(save_path).expanduser()
            if kept and save_path
            else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        )
        workspace = Workspace(root, prepared.config.save.on_existing if kept else None, _fingerprint(prepared))
        needed = prepared.estimate.disk - workspace.taken()
        if needed > (free := free_disk(root)):
            raise RunError(
                f"not enough disk for {root}: about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free",
                "free some, name another save.save_path, or save fewer formats",
            )
        journal = workspace.open()
        checkpoint = prepared.checkpoint
        source = BlockSource(checkpoint.units(prepared.skeleton.units), checkpoint.decode)
        stack.callback(source.close)
        surveyed = survey(prepared, source, workspace, journal, listener)
        selection = surveyed.selection
        encoded = compress_encoder(prepared, workspace, listener)
        sinks, transformed = _sinks(prepared, workspace, selection, keep_records=kept)
        store = ActivationStore(workspace.state, host_memory(prepared))
        outcome = _engine(
            prepared, source, sinks, transformed, store, journal, listener, selection.dropped, encoded.front
        ).run()
        layers = kept_layers(prepared.layers, selection)
        perplexities = _perplexities(prepared, "ppl", outcome.losses)
        perplexities += _perplexities(prepared, "decode_ppl", outcome.decoded)
        written = [*sinks, *([transformed] if transformed else [])]
        outputs = _finish_outputs(prepared, workspace, written, journal, layers, selection)
        measured = Measured(
            seconds=time.perf_counter() - started,
            by_kind=surveyed.seconds | encoded.seconds | outcome.seconds,
            bytes_read=outcome.bytes_read + encoded.bytes_read,
            peak_host=peak_host_memory(),
            peak_device=torch.cuda.max_memory_allocated(prepared.device) if prepared.device.type == "cuda" else 0,
        )
        act = prepared.recipe.act or prepared.recipe.clustered
        metrics = make_metrics(
            config=prepared.loaded.resolved,
            versions=versions(),
            model={
                "path": str(prepared.folder),
                "adapter": prepared.adapter.name,
                "blocks": len(prepared.skeleton.blocks),
                "bytes": original_bytes(checkpoint),
                "input": checkpoint.says or None,
                "computing_dtype": str(prepared.skeleton.model.dtype).removeprefix("torch."),
                "device": str(prepared.device),
            },
            scheme=None if prepared.recipe.spec is None else prepared.recipe.spec.to_dict(),
            sparsity=None if prepared.recipe.sparsity is None else asdict(prepared.recipe.sparsity),
            activations=None if act is None else act.to_dict(),
            mixed=_mixed(prepared),
            kv_scheme=_kv_scheme(prepared),
            bits=bits_per_weight(layers),
            influence=surveyed.to_dict(),
            encoder=encoded.to_dict(),
            perplexities=perplexities,
            outputs=outputs,
            rows=journal.rows,
            calibration_tokens=sum(batch.tokens.numel() for batch in prepared.calib),
            measured=measured,
        )
        store.drop_mapped()
        if kept:
            workspace.finish(metrics)
        return Result(root if kept else None, outputs, perplexities, metrics)


# --- parts of a run ------------------------------------------------------------------------------------------------


def _fingerprint(prepared: Prepared) -> dict[str, str]:
    """Everything that the result depends on, by a name that a message can use."""
    resolved = json.loads(json.dumps(prepared.loaded.resolved))
    for key in _TUNING:
        resolved.get("base", {}).pop(key, None)
    resolved.get("save", {}).pop("on_existing", None)
    resolved.get("save", {}).pop("save_path", None)
    return {
        "configuration": json.dumps(resolved, sort_keys=True),
        "calibration text": tokens_digest([tensor for batch in prepared.calib for tensor in batch.tensors]),
        "evaluation text": tokens_digest([one.windows.tokens for one in prepared.evaluations]),
        "checkpoint": headers_digest(prepared.checkpoint.stored) + prepared.checkpoint.says,
        "set of library versions": json.dumps(versions(), sort_keys=True),
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("torch", "transformers", "compressed-tensors", "safetensors", "tokenizers", "scikit-learn")
    return {"llmc": __version__, **{name: version(name) for name in packages}}


def _sinks(
    prepared: Prepared, workspace: Workspace, selection: BlockSelection, *, keep_records: bool
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
    if keep_records and not transformed and "transformed" in positions_of(prepared.evaluations, prepared.recipe.kv):
        transformed = [sink(Transformed(recipe.spec, prepared.stored, compute), workspace.state / "transformed")]
    return sinks, transformed[0] if transformed else None


def _verify(exporter: Exporter, selection: BlockSelection, path: Path, record: Any) -> None:
    check_shard(path, exporter, record, selection.original)


def _engine(
    prepared: Prepared,
    source: BlockSource,
    sinks: list[Sink],
    transformed: Sink | None,
    store: ActivationStore,
    journal: Journal,
    listener: Listener,
    dropped: frozenset[int],
    front: CompressedFront,
) -> Engine:
    return Engine(
        skeleton=prepared.skeleton,
        source=source,
        recipe=prepared.recipe,
        subsets=prepared.subsets,
        heads=prepared.heads,
        calib=Batches(prepared.calib),
        evaluation=_evaluation_batches(prepared, "ppl"),
        decoding=_evaluation_batches(prepared, "decode_ppl"),
        sinks=sinks,
        transformed=transformed,
        store=store,
        journal=journal,
        device=prepared.device,
        options=EngineOptions(
            forward=forward_of(prepared.config.base.forward, prepared.estimate.held, prepared.device),
            checkpoint_every=prepared.config.base.checkpoint_every,
        ),
        listener=listener,
        frame=prepared.frame,
        dropped=dropped,
        front=front,
    )


def _evaluation_batches(prepared: Prepared, kind: str) -> Batches:
    found = [one for one in prepared.evaluations if one.kind == kind]
    return Batches([Batch(tokens) for one in found for tokens in one.batches], positions_of(found, prepared.recipe.kv))


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


def _perplexities(prepared: Prepared, kind: str, losses: Mapping[str, list[Tensor]]) -> list[Perplexity]:
    found, start = [], 0
    for one in (one for one in prepared.evaluations if one.kind == kind):
        stop = start + len(one.batches)
        for position in one.positions:
            windows = mean_losses(losses[state_of(position, prepared.recipe.kv)][start:stop])
            count, length = one.windows.tokens.shape
            text = one.windows
            value = perplexity(windows)
            measured = Perplexity(one.name, position, value, count, length, text.protocol, text.sha256, windows, kind)
            found.append(measured)
        start = stop
    return found


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


def peak_host_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024
