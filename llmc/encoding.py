"""The pass over an image encoder, before the one over the language blocks: the same engine on other blocks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .encoders import EncoderPlan
from .errors import RunError
from .eval.measure import Chunk, Watch
from .plan import forward_of
from .prepare import Prepared
from .quant import UnitRecord
from .report.metrics import BLOCK_KEYS
from .stream.activations import ActivationStore
from .stream.blockwork import WorkContext
from .stream.engine import Engine
from .stream.entrance import Entrance, Finished
from .stream.front import CompressedBlocks, CompressedFront
from .stream.journal import Journal
from .stream.options import Batches, EngineOptions, Listener
from .stream.records import RecordFormat
from .stream.sink import Sink
from .stream.skeleton import block_unit
from .stream.source import BlockSource
from .surveying import host_memory
from .workspace import Workspace

_MEASURED = frozenset({"pretrain", "fake_quant"})


@dataclass(frozen=True)
class Encoded:
    """What the pass left.

    Attributes:
        front: what stands in front of the language blocks, the encoder's compressed blocks in it.
        lists: those blocks.
        seconds: time in this process by kind of work.
        bytes_read: bytes of tensor data read from the checkpoint.
    """

    front: CompressedFront
    lists: tuple[CompressedBlocks, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0

    def to_dict(self) -> dict[str, Any] | None:
        """Plain values, for ``metrics.json``: of each block what is said of the language blocks, too."""
        if not self.lists:
            return None
        rows = [(one.encoder.path, row) for one in self.lists for row in one.journal.rows if row["kind"] == "unit"]
        return {
            "blocks": [
                {key: row[key] for key in BLOCK_KEYS} | {"unit": f"{path}.{row['unit'].rpartition('-')[2]}"}
                for path, row in rows
            ]
        }


def compress_encoder(prepared: Prepared, workspace: Workspace, listener: Listener) -> Encoded:
    """Compress the encoder's blocks, or what an interrupted run left of them.

    Each list has a folder, a journal and activation checkpoints of its own in the run's state. The records of its
    blocks stay there until the language model's pass has written them with everything else.
    """
    plan = prepared.encoder
    if plan is None:
        return Encoded(CompressedFront(prepared.skeleton))
    context = WorkContext(plan.recipe, plan.encoder.heads, prepared.device, "auto")
    lists = tuple(_compressed(plan, number, context, workspace) for number in range(len(plan.lists)))
    if all(_is_done(one) for one in lists):
        return Encoded(CompressedFront(prepared.skeleton, lists), lists)
    started = time.perf_counter()
    stores = [ActivationStore(one.sink.folder, host_memory(prepared)) for one in lists]
    bytes_read = 0
    for number, one in enumerate(lists):
        finished = [(lists[before].encoder.blocks, stores[before].streams) for before in range(number)]
        bytes_read += _run(prepared, one, stores[number], finished, listener)
    for store in stores:
        store.drop_mapped()
    seconds = {"encoder": time.perf_counter() - started}
    return Encoded(CompressedFront(prepared.skeleton, lists), lists, seconds, bytes_read)


def _compressed(plan: EncoderPlan, number: int, context: WorkContext, workspace: Workspace) -> CompressedBlocks:
    """A list with what an earlier run has left of it."""
    encoder, folder = plan.lists[number], workspace.state / f"encoder-{number}"
    folder.mkdir(exist_ok=True)
    specs = {layer.name: layer.spec for layer in plan.layers if layer.spec is not None}
    units = [block_unit(index) for index in range(len(encoder.blocks))]
    sink = Sink(folder, RecordFormat(specs), units, _read_back)
    return CompressedBlocks(encoder, context, plan.encoder.subsets, sink, Journal(folder / "journal.jsonl"))


def _read_back(path: Path, record: UnitRecord) -> None:
    """Look whether every part of a record can be read again; the shard's digest guards its values."""
    with safe_open(path, "pt") as stored:
        names = set(stored.keys())
    missing = [name for name in record.quantized if f"{name}.codes" not in names] + list(record.plain.keys() - names)
    if missing:
        raise RunError(f"{path}: {missing[0]} wasn't written", "please report this")


def _is_done(blocks: CompressedBlocks) -> bool:
    return all(blocks.journal.unit(block_unit(index)) is not None for index in range(blocks.count))


def _run(
    prepared: Prepared, one: CompressedBlocks, store: ActivationStore, finished: Sequence[Finished], listener: Listener
) -> int:
    """The engine's pass over a list; returns the bytes that it read. The streams behind the list stay in the store."""
    plan, checkpoint, config = prepared.encoder, prepared.checkpoint, prepared.config
    if plan is None:
        raise ValueError("there is no encoder to compress")
    images = plan.images(prepared.calib)
    source = BlockSource(checkpoint.units(one.encoder.units), checkpoint.decode)
    try:
        return (
            Engine(
                skeleton=one.encoder,
                source=source,
                recipe=plan.recipe,
                subsets=[one.subsets] * one.count,
                heads=plan.encoder.heads,
                calib=Batches(images),
                evaluation=Batches(images, [Watch(_Passing(), range(len(images)), _MEASURED)] if images else []),
                sinks=[one.sink],
                transformed=None,
                store=store,
                journal=one.journal,
                device=prepared.device,
                options=EngineOptions(
                    forward=forward_of(config.base.forward, plan.held(images), prepared.device),
                    checkpoint_every=config.base.checkpoint_every,
                ),
                listener=_OfEncoder(listener),
                entrance=Entrance(one.encoder, store, prepared.device, finished),
                blocks_only=True,
            )
            .run()
            .bytes_read
        )
    finally:
        source.close()


@dataclass(frozen=True)
class _Passing:
    """Wants streams through the blocks, whose errors are measured there; an encoder has no logits."""

    compares: bool = False

    def see(self, chunk: Chunk) -> None:
        """There are none."""


@dataclass(frozen=True)
class _OfEncoder:
    """Tells a listener that the blocks are an encoder's."""

    listener: Listener

    def started(self, blocks: int, done: int) -> None:
        """The pass begins."""
        self.listener.started(blocks, done)

    def block(self, index: int, row: Mapping[str, Any]) -> None:
        """A block is finished."""
        self.listener.block(index, row)

    def phase(self, text: str) -> None:
        """What is going on now."""
        self.listener.phase(f"encoder: {text}")
