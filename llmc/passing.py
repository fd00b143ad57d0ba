"""The engine for what has been prepared."""

from __future__ import annotations

from collections.abc import Sequence

from .prepare import Prepared
from .stream.activations import ActivationStore
from .stream.analysis import AnalysisPlan
from .stream.engine import Engine
from .stream.front import CompressedFront
from .stream.journal import Journal
from .stream.options import Batches, EngineOptions, Listener
from .stream.sink import Sink
from .stream.source import BlockSource

NOTHING = Batches(())


def make_engine(
    prepared: Prepared,
    source: BlockSource,
    store: ActivationStore,
    journal: Journal,
    options: EngineOptions,
    listener: Listener,
    *,
    sinks: Sequence[Sink],
    transformed: Sink | None,
    dropped: frozenset[int],
    calib: Batches = NOTHING,
    evaluation: Batches = NOTHING,
    decoding: Batches = NOTHING,
    analysis: AnalysisPlan | None = None,
    front: CompressedFront | None = None,
) -> Engine:
    """An engine over a model's blocks; see ``Engine`` for what its arguments are."""
    return Engine(
        skeleton=prepared.skeleton,
        source=source,
        recipe=prepared.recipe,
        subsets=prepared.subsets,
        heads=prepared.heads,
        calib=calib,
        evaluation=evaluation,
        decoding=decoding,
        sinks=sinks,
        transformed=transformed,
        store=store,
        journal=journal,
        device=prepared.device,
        options=options,
        listener=listener,
        frame=prepared.frame,
        dropped=dropped,
        analysis=analysis,
        front=front,
    )
