"""One pass over the blocks: load, calibrate, compress, write, propagate, forget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms import Frame, Recipe
from ..errors import RunError
from ..models import Heads, Subset
from ..quant import KvRanges, UnitRecord
from .activations import ActivationStore
from .analysis import COMPRESSED, ORIGINAL, AnalysisPlan, BlockAnalysis
from .attention import attending, attending_to_cache, cache_ranges
from .batch import Batch
from .blockwork import BlockWork, WorkContext
from .clock import Clock
from .clustered import ClusteredBlock
from .edges import Edges
from .entrance import Entrance
from .front import CompressedFront
from .head import Head
from .journal import Journal
from .memory import give_back_memory, short_collections
from .options import Batches, EngineOptions, Listener, Outcome
from .sink import Sink
from .skeleton import EMBED, HEAD, Skeleton, block_unit
from .source import BlockSource
from .stages import BlockRun, propagate

_NONE = Batches(())
_EVALUATED = ("eval", "decode")  # the kinds of streams that end at the head
_COMPRESSED = ("fake_quant", "fake_quant_wo_kv")


class Engine:
    """Compresses a model block by block.

    Args:
        skeleton: the empty model.
        source: its weights.
        recipe: what to do.
        subsets: the subsets of each block.
        heads: attention geometry.
        calib: calibration batches.
        evaluation: evaluation batches, and what is measured of them.
        decoding: the same to be evaluated as a decoder does: each token appended to a KV cache, attending to it.
        sinks: where units are written; the first whose weights are the compressed ones is read back by a resumed run.
        transformed: the sink of the transformed, unquantized model, if wanted.
        store: activations.
        journal: what is done.
        device: where blocks are run.
        options: how to run.
        listener: hears of progress.
        frame: what transforms may know of the model that need no data; None: there is none of them.
        dropped: blocks that only the evaluation of the original passes.
        analysis: what is looked at on the way; None: nothing.
        front: what an earlier pass has compressed of what stands in front of the blocks; None: nothing.
        entrance: runs what stands in front of the blocks; None: the usual.
        blocks_only: write and evaluate nothing but blocks: what is around them belongs to another pass.
    """

    def __init__(
        self,
        *,
        skeleton: Skeleton,
        source: BlockSource,
        recipe: Recipe,
        subsets: Sequence[tuple[Subset, ...]],
        heads: Heads,
        calib: Batches,
        evaluation: Batches,
        sinks: Sequence[Sink],
        transformed: Sink | None,
        store: ActivationStore,
        journal: Journal,
        device: torch.device,
        options: EngineOptions,
        listener: Listener,
        frame: Frame | None = None,
        decoding: Batches = _NONE,
        dropped: frozenset[int] = frozenset(),
        analysis: AnalysisPlan | None = None,
        front: CompressedFront | None = None,
        entrance: Entrance | None = None,
        blocks_only: bool = False,
    ) -> None:
        if any(row["kind"] == "unit" for row in journal.rows) and recipe.steps and not sinks:
            raise ValueError("a run can't be resumed without a sink that holds the compressed blocks")
        self._skeleton, self._source, self._recipe = skeleton, source, recipe
        self._batches = {"calib": calib, "eval": evaluation, "decode": decoding}
        self._measured = evaluation.states | decoding.states
        self._ranges: KvRanges | None = None
        self._clustered: ClusteredBlock | None = None
        self._sinks, self._transformed = sinks, transformed
        self._store, self._journal, self._device = store, journal, device
        self._options, self._listener = options, listener
        self._count, self._dropped = len(skeleton.blocks), dropped
        self._entrance = entrance or Entrance(skeleton, store, device)
        self._front, self._blocks_only = front or CompressedFront(skeleton), blocks_only
        self._analysis = analysis
        self._batches["analysis"] = _NONE if analysis is None else Batches(analysis.batches)
        self._clock = Clock(device)
        self._timed = self._clock.timed
        self._online = recipe.online(frame)
        self._subsets = [tuple(map(self._online.cut, own)) for own in subsets]
        self._work = WorkContext(recipe, heads, device, options.forward, frame, self._online)
        self._edges = Edges(recipe.at_load, frame, skeleton, device)

    @torch.no_grad()
    def run(self) -> Outcome:
        """Do the whole pass, or what an interrupted one left.

        Raises:
            CheckpointError: a weight is missing, misshapen, NaN or infinite.
            RunError: a block's output isn't finite.
        """
        with short_collections():
            return self._run_all()

    def _run_all(self) -> Outcome:
        self._source.prefetch(EMBED)
        self._prefetch_behind(-1)
        embedding = self._embed()
        done = sum(self._journal.unit(block_unit(index)) is not None for index in range(self._count))
        self._listener.started(self._count, done)
        first = self._restore()
        for index in range(first, self._count):
            if self._passed(index):
                self._block(index)
        if not self._blocks_only:
            self._head(embedding)
        seconds, peak_device = self._clock.finish()
        return Outcome(self._source.bytes_read, seconds, peak_device)

    # --- before the blocks -------------------------------------------------------------------------------------------

    def _embed(self) -> dict[str, Tensor]:
        """Make the inputs of the first block. Returns the raw embedding if a tied head will need it again."""
        self._listener.phase("embedding")
        raw = self._source.take(EMBED)
        changed = self._edges.embedding(raw)
        self._write_through(EMBED, self._front.record(changed))
        wanted, resumed = self._wanted_streams(), self._journal.last("activations") is not None
        for weights, names in self._edges.by_state(raw, changed, wanted):
            self._skeleton.load(weights)
            for own, apart in self._front.by_encoder(names, weights):
                for name in own:
                    self._entrance.fill(name, wanted[name], keep=not resumed, apart=apart)
        self._skeleton.release_unit(EMBED)
        kept = self._skeleton.tied_head and (self._edges.change or self._measured) and not self._blocks_only
        give_back_memory()
        return raw if kept else {}

    def _wanted_streams(self) -> dict[str, Sequence[Batch]]:
        """Streams that somebody reads."""
        wanted: dict[str, Sequence[Batch]] = {}
        if self._recipe.original_stream:
            wanted["calib.original"] = self._batches["calib"].batches
        if self._recipe.compressed_stream:
            wanted["calib.compressed"] = self._batches["calib"].batches
        if self._batches["analysis"].batches:
            wanted |= dict.fromkeys((ORIGINAL, COMPRESSED), self._batches["analysis"].batches)
        for kind in _EVALUATED:
            for state in sorted(self._batches[kind].states):
                wanted[f"{kind}.{state}"] = self._batches[kind].batches
        return wanted

    def _restore(self) -> int:
        """Index of the block to go on with."""
        checkpoint = self._journal.last("activations")
        if checkpoint is None:
            return 0
        self._listener.phase(f"restoring the activations behind block {checkpoint['after']}")
        self._store.restore(checkpoint["file"])
        return int(checkpoint["after"]) + 1

    def _passed(self, index: int) -> bool:
        """Whether some stream goes through a block."""
        return index not in self._dropped or "pretrain" in self._measured

    def _prefetch_behind(self, index: int) -> None:
        """Start reading the next block that is passed, or the head."""
        following = next((other for other in range(index + 1, self._count) if self._passed(other)), None)
        self._source.prefetch(HEAD if following is None else block_unit(following))

    # --- a block -----------------------------------------------------------------------------------------------------

    def _block(self, index: int) -> None:
        unit = block_unit(index)
        self._clock.begin()
        self._listener.phase(f"block {index + 1}/{self._count}")
        raw = self._timed("read", lambda: self._source.take(unit))
        self._prefetch_behind(index)
        stored = {self._skeleton.parameter_of[name]: (name, tensor.dtype) for name, tensor in raw.items()}
        self._skeleton.load(raw)
        del raw
        give_back_memory()
        block = self._skeleton.blocks[index]
        self._ranges = self._clustered = None
        self._evaluate(index, "pretrain")
        row = None
        if index not in self._dropped:
            row = self._compressed(index, block, stored)
        self._gate(index)
        self._skeleton.release(block)
        del block
        give_back_memory()
        if row is not None:
            self._listener.block(index, row)
        behind = sum(self._passed(other) for other in range(index + 1))
        if behind % self._options.checkpoint_every == 0 and index + 1 < self._count and self._store.streams:
            self._checkpoint(index)

    def _compressed(
        self, index: int, block: nn.Module, stored: Mapping[str, tuple[str, torch.dtype]]
    ) -> dict[str, Any]:
        """Bring the compressed model behind a block; returns the block's row."""
        unit = block_unit(index)
        row = self._journal.unit(unit)
        analysis = self._analysis_of(index)
        if analysis is not None:
            self._timed("analyze", partial(analysis.pass_original, looking=row is None))
        work = BlockWork(self._work, self._subsets[index], index, block, self._prefix(index), stored, analysis)
        self._clustered = work.clustered
        self._timed("calibrate", work.load)
        if row is None:
            row = self._compress(index, unit, work)
            row |= self._clock.lap()
            self._journal.append(row)
        else:
            self._replay(index, unit, work, row)
        work.remove_hooks()
        self._clustered = None
        return row

    def _analysis_of(self, index: int) -> BlockAnalysis | None:
        if self._analysis is None:
            return None
        runs = self._run(index, ORIGINAL), self._run(index, COMPRESSED)
        return BlockAnalysis(self._analysis, index, self._subsets[index], self._online, *runs)

    def _compress(self, index: int, unit: str, work: BlockWork) -> dict[str, Any]:
        original, compressed = self._run(index, "calib.original"), self._run(index, "calib.compressed")
        self._timed("calibrate", lambda: work.transform(original, compressed))
        if self._recipe.calibrates_cache and compressed is not None:
            work.ranges = self._ranges = self._timed(
                "calibrate", partial(cache_ranges, self._skeleton.model, compressed, self._online.keys)
            )
        outputs: dict[str, Any] = {}
        if self._transformed is not None or "transformed" in self._measured:
            plain = work.record(quantized=False)
            if self._transformed is not None:
                outputs[self._transformed.format.name] = self._write(self._transformed, unit, plain)
            with work.weights.holding(
                plain
            ):  # what is evaluated is what is written, the steps go on with the exact weights
                self._evaluate(index, "transformed")
            del plain
        propagated = self._timed("calibrate", lambda: work.quantize(original, compressed))
        done = work.record(quantized=True)
        for sink in self._sinks:
            outputs[sink.format.name] = self._write(sink, unit, done)
        if compressed is not None and not propagated:
            self._timed("calibrate", lambda: propagate(compressed))
        self._evaluate(index, *_COMPRESSED)
        layers, found = self._timed("analyze", work.analyzed)
        return {
            "kind": "unit",
            "unit": unit,
            "outputs": outputs,
            "layers": layers,
            "activations": found,
            "scales": work.scales,
            "inputs": work.inputs.ranges,
            "clusters": None if work.clustered is None else work.clustered.plain,
            "cache_ranges": None if work.ranges is None else asdict(work.ranges),
            "tuning": None if work.tuning is None else asdict(work.tuning),
            "error": self._relative_error(),
        }

    def _replay(self, index: int, unit: str, work: BlockWork, row: dict[str, Any]) -> None:
        """Bring the streams past a block that an earlier run wrote, with exactly what it wrote."""
        original, compressed = self._run(index, "calib.original"), self._run(index, "calib.compressed")
        if row["cache_ranges"] is not None:
            self._ranges = KvRanges(*(tuple(row["cache_ranges"][name]) for name in ("key", "value")))
        if original is not None:
            propagate(original)
        if self._transformed is not None and "transformed" in self._measured:
            work.weights.set(self._transformed.read(unit, row["outputs"][self._transformed.format.name]))
            self._evaluate(index, "transformed")
        if self._sinks:
            work.restore(self._sinks[0].read(unit, row["outputs"][self._sinks[0].format.name]), row)
        if compressed is not None:
            propagate(compressed)
        self._evaluate(index, *_COMPRESSED)
        if work.analysis is not None:
            self._timed("analyze", work.analysis.pass_compressed)

    def _run(self, index: int, stream: str) -> BlockRun | None:
        if stream not in self._store.streams:
            return None
        batches = self._batches[stream.partition(".")[0]].batches
        return self._entrance.run(index, stream, batches, partial(self._attention, stream))

    def _attention(self, stream: str) -> AbstractContextManager[None]:
        """The compressed model attends over its quantized KV cache, also where it's calibrated, or with what a method
        of clusters rounds; that one watches the attention of whatever stream calibrates it."""
        kind, _, state = stream.partition(".")
        clustered = self._clustered
        if clustered is not None and clustered.on:
            return attending(self._skeleton.model, clustered.attend)
        kv = self._recipe.kv if state in ("compressed", "fake_quant") else None
        keys = self._online.keys
        return attending_to_cache(self._skeleton.model, kv, self._ranges, decode=kind == "decode", rotation=keys)

    def _evaluate(self, index: int, *states: str) -> None:
        for stream in (f"{kind}.{state}" for state in states for kind in _EVALUATED):
            run = self._run(index, stream)
            if run is not None:
                self._timed("evaluate", partial(propagate, run))

    def _gate(self, index: int) -> None:
        """Nothing goes on behind a block whose output isn't finite."""
        for stream in self._store.streams.values():
            for batch in stream.tensors().values():
                if not math.isfinite(float(batch.sum(dtype=torch.float32))) and not batch.isfinite().all():
                    raise RunError(
                        f"the output of block {index} isn't finite ({stream.name})",
                        "compute in a wider dtype: set model.torch_dtype to torch.bfloat16 or torch.float32",
                    )

    def _relative_error(self) -> float | None:
        """``|y_q - y|² / |y|²`` on the evaluation text behind this block."""
        original, compressed = (self._store.streams.get(f"eval.{p}") for p in ("pretrain", "fake_quant"))
        if original is None or compressed is None:
            return None
        change = size = 0.0
        for y, y_q in zip(original.tensors().values(), compressed.tensors().values(), strict=True):
            y = self._edges.hidden(y)
            change += float((y_q.float() - y).square().sum())
            size += float(y.square().sum())
        return change / max(size, 1e-30)

    def _checkpoint(self, index: int) -> None:
        previous = self._journal.last("activations")
        file = f"activations-{index}.safetensors"
        self._timed("checkpoint", lambda: self._store.save(file))
        self._journal.append({"kind": "activations", "after": index, "file": file})
        if previous is not None:
            self._store.remove(previous["file"])

    # --- behind the blocks -------------------------------------------------------------------------------------------

    def _head(self, embedding: dict[str, Tensor]) -> None:
        self._listener.phase("head")
        raw = self._source.take(HEAD)
        changed = self._edges.head(raw, embedding)
        self._write_through(HEAD, UnitRecord(plain=changed))
        if self._measured:
            texts = {kind: self._batches[kind] for kind in _EVALUATED}
            head = Head(self._skeleton, self._edges, self._store, self._device)
            self._timed("evaluate", lambda: head.show(raw, changed, embedding, texts))

    def _write_through(self, unit: str, done: UnitRecord) -> None:
        """Embedding and head go to every output alike."""
        if self._journal.unit(unit) is not None or self._blocks_only:
            return
        sinks = [*self._sinks, *([self._transformed] if self._transformed is not None else [])]
        outputs = {sink.format.name: self._write(sink, unit, done) for sink in sinks}
        self._journal.append({"kind": "unit", "unit": unit, "outputs": outputs})

    # --- small things ------------------------------------------------------------------------------------------------

    def _prefix(self, index: int) -> str:
        block = self._skeleton.blocks[index]
        names: Iterator[str] = (name for name, module in self._skeleton.model.named_modules() if module is block)
        return next(names)

    def _write(self, sink: Sink, unit: str, unit_record: UnitRecord) -> dict[str, Any]:
        give_back_memory()
        written: dict[str, Any] = self._timed("write", lambda: sink.write(unit, unit_record))
        return written
