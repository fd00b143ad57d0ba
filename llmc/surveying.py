"""Which blocks stay: surveys the original model where the configuration asks for fewer, and drops the rest."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field, replace
from typing import Any

from .algorithms import BlockInfluence, least_influential
from .export import Layer
from .models import BlockSelection
from .prepare import Prepared
from .stream.activations import ActivationStore
from .stream.journal import Journal
from .stream.options import Listener
from .stream.source import BlockSource
from .stream.survey import Survey
from .workspace import Workspace


@dataclass(frozen=True)
class Surveyed:
    """What was found.

    Attributes:
        selection: the blocks that stay.
        influences: of every block; empty if nobody asked.
        seconds: time in this process by kind of work.
    """

    selection: BlockSelection
    influences: tuple[float, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any] | None:
        """Plain values, for ``metrics.json``."""
        if not self.influences:
            return None
        return {"influence": list(self.influences), "dropped": sorted(self.selection.dropped)}


def survey(
    prepared: Prepared, source: BlockSource, workspace: Workspace, journal: Journal, listener: Listener
) -> Surveyed:
    """Find the blocks of the least influence, unless the journal has them already."""
    skeleton, recipe = prepared.skeleton, prepared.recipe
    whole = skeleton.selection()
    if not recipe.drop_blocks:
        return Surveyed(whole)
    started = time.perf_counter()
    folder = workspace.state / "survey"
    folder.mkdir(exist_ok=True)
    store = ActivationStore(folder, host_memory(prepared))
    influences = Survey(
        skeleton=skeleton,
        source=source,
        batches=prepared.calib,
        statistic=BlockInfluence,
        store=store,
        journal=journal,
        device=prepared.device,
        checkpoint_every=prepared.config.base.checkpoint_every,
        phase=listener.phase,
    ).run()
    store.streams.clear()
    shutil.rmtree(folder)
    protected = [index for index in range(whole.count) if recipe.ignored.covers_block(index)]
    dropped = least_influential(influences, recipe.drop_blocks, protected)
    seconds = {"survey": time.perf_counter() - started}
    return Surveyed(replace(whole, dropped=dropped), tuple(influences), seconds)


def kept_layers(layers: list[Layer], selection: BlockSelection) -> list[Layer]:
    """The Linears of the blocks that stay, by their names in the smaller model."""
    return [
        replace(
            layer,
            name=selection.renamed(layer.name),
            fused=tuple(map(selection.renamed, layer.fused)),
            module=selection.renamed(layer.module),
        )
        for layer in layers
        if selection.keeps(f"{layer.name}.")
    ]


def host_memory(prepared: Prepared) -> int | None:
    """Bytes that activations may take of the host's memory; None: to be found out."""
    budget = prepared.config.base.host_memory_gb
    return None if budget is None else int(budget * 2**30)
