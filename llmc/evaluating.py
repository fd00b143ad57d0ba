"""A model gone through again, to measure it: the original, or what a run has written of the compressed one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .algorithms import Recipe
from .errors import RunError
from .eval.measure import ORIGINAL, Chunk, Watch
from .measuring import state_of
from .passing import NOTHING, make_engine
from .prepare import Prepared
from .stream.activations import ActivationStore
from .stream.batch import Batch
from .stream.journal import Journal
from .stream.options import Batches, EngineOptions, Listener, Outcome, Silent
from .stream.sink import Sink
from .stream.skeleton import EMBED, HEAD
from .stream.source import BlockSource
from .surveying import host_memory

_STATES = {ORIGINAL, "transformed", "fake_quant", "fake_quant_wo_kv"}

Visit = Callable[[int, int, Tensor], None]
"""Called with the number of a batch, its first token here, and logits, float32 ``[batch, tokens, vocabulary]``."""


@dataclass(frozen=True)
class Evaluable:
    """A model that can be gone through as often as somebody likes, one block in memory at a time.

    Attributes:
        prepared: everything that is known of it before a weight is read.
        written: where the compressed blocks can be read back; None: there is only the original.
        transformed: where the transformed, unquantized ones can; None: nowhere.
        rows: of each compressed block by its unit, what the journal (or ``metrics.json``) says of it.
        dropped: the blocks that the compressed model is without.
    """

    prepared: Prepared
    written: Sink | None = None
    transformed: Sink | None = None
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dropped: frozenset[int] = frozenset()

    @classmethod
    def original(cls, prepared: Prepared) -> Evaluable:
        """The model as it came, whatever the configuration would make of it."""
        return cls(replace(prepared, recipe=Recipe((), None), frame=None))

    def check(self, states: frozenset[str]) -> None:
        """Refuse states that can't be gone through.

        Raises:
            RunError: names the position.
            ValueError: there is no such position at all.
        """
        if unknown := states - _STATES:
            raise ValueError(f"{min(unknown)} is no state of a model; there are {', '.join(sorted(_STATES))}")
        if "transformed" in states and self.transformed is None:
            raise RunError(
                "eval_pos: transformed: the run kept no weights from before they were rounded",
                "leave it out here, and next time set save.save_trans: True in the run itself",
            )
        compressed = sorted(states - {ORIGINAL, "transformed"})
        if compressed and self.written is None:
            raise RunError(f"eval_pos: {compressed[0]}: there is no compressed model", "evaluate pretrain")


def stream_logits(
    run: Evaluable, state: str, batches: Sequence[Tensor], visit: Visit, listener: Listener | None = None
) -> None:
    """Push batches of tokens through a model, and show their logits some tokens at a time, the last token's included.

    Sequences that are shorter than the others of their batch may be padded on the right with any token: attention is
    causal, and what comes behind a sequence has no part in its logits.

    Args:
        run: the model.
        state: of it, one of ``eval_pos``: ``pretrain``, ``transformed``, ``fake_quant``, ``fake_quant_wo_kv``.
        batches: token ids, int64 ``[batch, tokens]``; each batch may have a length of its own.
        visit: called with ``(batch_index, start, logits)``, batch by batch, and from the first token on; ``logits`` are
            float32 ``[batch, tokens, vocabulary]`` on the computing device, of the tokens from ``start`` on. They are
            gone when it returns.
        listener: hears of progress.

    Raises:
        RunError: the model has no such state, or a file of it is missing or damaged.
        ValueError: nothing has such a state.
    """
    if not batches:
        return
    own = frozenset({state_of(state, run.prepared.recipe.kv)})
    watch = Watch(_Visitor(visit), range(len(batches)), own)
    go_through(run, Batches([Batch(tokens) for tokens in batches], [watch], last=True), NOTHING, listener)


@dataclass
class _Visitor:
    """A measure that lets somebody else look."""

    visit: Visit
    compares: bool = False

    def see(self, chunk: Chunk) -> None:
        self.visit(chunk.batch, chunk.start, chunk.logits)


def go_through(run: Evaluable, evaluation: Batches, decoding: Batches, listener: Listener | None = None) -> Outcome:
    """Bring streams through every block as the run left it, and show the logits to their measures.

    The blocks come by the way that a resumed run takes past what it has written: rounded inputs, the scales of the KV
    cache, rotations and blocks left out are the run's, and so is every number.

    Raises:
        RunError: the model has no such state, or a file of it is missing or damaged.
    """
    states = evaluation.states | decoding.states
    run.check(states)
    if states <= {ORIGINAL}:
        run = Evaluable.original(run.prepared)
    prepared = run.prepared
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        journal = Journal(folder / "journal.jsonl")
        if run.written is not None:
            known: dict[str, Any] = {
                sink.format.name: {} for sink in (run.written, run.transformed) if sink is not None
            }
            for unit in (EMBED, *run.rows, HEAD):
                journal.append({"kind": "unit", "unit": unit, "outputs": known} | dict(run.rows.get(unit, {})))
        source = BlockSource(prepared.checkpoint.units(prepared.skeleton.units), prepared.checkpoint.decode)
        stack.callback(source.close)
        store = ActivationStore(folder, host_memory(prepared))
        stack.callback(store.drop_mapped)
        engine = make_engine(
            prepared,
            source,
            store,
            journal,
            EngineOptions("replay", checkpoint_every=len(prepared.skeleton.blocks)),
            listener or Silent(),
            sinks=[] if run.written is None else [run.written],
            transformed=run.transformed,
            dropped=run.dropped,
            evaluation=evaluation,
            decoding=decoding,
        )
        return engine.run()
