"""Measures what each candidate scheme costs in each layer: passes over the model in front of the one that compresses.

The first lets the recipe's quantizer round every Linear with every candidate, behind the recipe's transforms, and takes
the relative errors of the outputs. The other two, forward and backward, find how much the model's output depends on
each Linear's. Nothing but one block is in memory; the hidden states in front of all blocks are in the store. A pass
that is interrupted starts again.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..algorithms import Measuring, Recipe, Step
from ..config import LoadedConfig
from ..config.budget import BudgetConfig
from ..configuring import load_config
from ..errors import ConfigError
from ..plan import layer_bits
from ..prepare import Prepared, prepare
from ..stream.activations import ActivationStore
from ..stream.engine import Engine
from ..stream.files import write_json
from ..stream.gradients import Gradients, Outputs
from ..stream.headers import headers_digest
from ..stream.journal import Journal
from ..stream.options import Batches, EngineOptions
from ..stream.skeleton import block_unit
from ..stream.source import BlockSource
from ..surveying import host_memory
from ..workspace import STATE
from .budgeting import Budget, Settled, check_gradients, chosen, losses_of, make_budget, settle
from .candidates import Candidate, Group
from .sensitivity import FILE, LayerSensitivity, Sensitivity, Trial

_CHOICE = "mix_bits"  # kind of the journal's row

Errors = Sequence[Mapping[str, Sequence[float]]]
"""Of each block, for each Linear by its name in the block, the relative error with each candidate."""


@dataclass(frozen=True)
class _Quiet:
    """A listener that hears of phases only."""

    say: Callable[[str], None]

    def started(self, blocks: int, done: int) -> None:
        """Ignore."""

    def block(self, index: int, row: Mapping[str, Any]) -> None:
        """Ignore."""

    def phase(self, text: str) -> None:
        """Pass on."""
        self.say(f"sensitivity: {text}")


def measure(
    prepared: Prepared,
    groups: Sequence[Group],
    candidates: Sequence[Candidate],
    source: BlockSource,
    state: Path,
    phase: Callable[[str], None],
) -> Sensitivity:
    """Losses of all candidates in all layers of the groups.

    Args:
        prepared: the run; its recipe says which quantizer rounds.
        groups: layers that share a scheme.
        candidates: the schemes.
        source: the weights, which are read three times.
        state: a folder to work in; it is made, and removed at the end.
        phase: hears what is going on.

    Raises:
        LlmcError: the checkpoint is damaged, or a block's output isn't finite.
    """
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    errors = _errors(prepared, candidates, source, state, phase)
    outputs = Gradients(
        skeleton=prepared.skeleton,
        source=source,
        batches=prepared.calib,
        linears=_measured(groups, len(prepared.skeleton.blocks)),
        store=ActivationStore(state, host_memory(prepared)),
        device=prepared.device,
        seed=prepared.recipe.seed,
        phase=phase,
    ).run()
    shutil.rmtree(state)
    tokens = sum(batch.tokens.numel() for batch in prepared.calib)
    return Sensitivity(
        {"path": str(prepared.folder), "headers": headers_digest(prepared.checkpoint.stored)},
        {"method": [step.algorithm.name for step in prepared.recipe.steps], "tokens": tokens},
        tuple(candidate.to_dict() for candidate in candidates),
        tuple(_layers(groups, candidates, errors, outputs, tokens)),
    )


def settled_by_measuring(
    prepared: Prepared,
    budget: Budget,
    source: BlockSource,
    root: Path,
    journal: Journal,
    phase: Callable[[str], None],
    *,
    keep: bool,
) -> Settled:
    """The schemes that a budget buys. The journal has the choice, once it's made; ``sensitivity.json`` has the losses.

    Args:
        prepared: the run.
        budget: that it has to spend.
        source: the weights.
        root: the run's folder.
        journal: of the run.
        phase: hears what is going on.
        keep: write the losses.

    Raises:
        LlmcError: the checkpoint is damaged, or a block's output isn't finite.
    """
    row = journal.last(_CHOICE)
    if row is not None:
        return chosen(prepared, budget, row["choice"], row["loss"])
    found = measure(prepared, budget.groups, budget.candidates, source, root / STATE / "sensitivity", phase)
    losses = losses_of(found, budget)
    if keep:
        write_json(root / FILE, found.to_dict())
    settled = settle(prepared, budget, losses)
    journal.append({"kind": _CHOICE, "choice": list(settled.choice), "loss": settled.loss})
    return settled


def sensitivity(loaded: LoadedConfig, phase: Callable[[str], None]) -> tuple[Sensitivity, Path]:
    """Measure a configuration's model, and write ``sensitivity.json`` into its ``save.save_path``.

    Args:
        loaded: a run's configuration; what it says of evaluations and of a budget's size doesn't matter.
        phase: hears what is going on.

    Returns:
        What was found, and where it was written.

    Raises:
        LlmcError: bad input.
    """
    if not loaded.config.save.save_path:
        raise ConfigError(f"save.save_path: missing; {FILE} is written there", "add it")
    if loaded.config.quant is None or loaded.config.quant.weight is None:
        raise ConfigError("quant.weight: missing; sensitivity tries its candidates", "add it, with any number of bits")
    resolved = copy.deepcopy(loaded.resolved)
    resolved["eval"] = []
    resolved["quant"]["bit_budget"] = {**(resolved["quant"]["bit_budget"] or {}), "bits": None, "losses": None}
    prepared = prepare(load_config(resolved))
    check_gradients(prepared)
    quant = prepared.config.quant
    budget = make_budget(prepared, (quant.bit_budget if quant else None) or BudgetConfig.defaults())
    root = Path(loaded.config.save.save_path).expanduser()
    checkpoint, state = prepared.checkpoint, root / STATE
    source = BlockSource(checkpoint.units(prepared.skeleton.units), checkpoint.decode)
    try:
        found = measure(prepared, budget.groups, budget.candidates, source, state / "sensitivity", phase)
    finally:
        source.close()
    if not any(state.iterdir()):
        state.rmdir()
    write_json(root / FILE, found.to_dict())
    return found, root / FILE


def _measured(groups: Sequence[Group], blocks: int) -> list[list[str]]:
    """Of each block the Linears of the groups."""
    found: list[list[str]] = [[] for _ in range(blocks)]
    for group in groups:
        found[group.block] += [member.kind for member in group.members]
    return found


def _layers(
    groups: Sequence[Group],
    candidates: Sequence[Candidate],
    errors: Errors,
    outputs: Sequence[Mapping[str, Outputs]],
    tokens: int,
) -> list[LayerSensitivity]:
    found = []
    for number, group in enumerate(groups):
        for member in group.members:
            layer = member.layer
            importance = outputs[group.block][member.kind].importance(tokens)
            # A Linear that no forward reaches loses nothing.
            own = errors[group.block].get(member.kind) or [0.0] * len(candidates)
            trials = tuple(
                Trial(importance * error, error, layer_bits(layer, candidate.spec) / (layer.rows * layer.columns))
                for error, candidate in zip(own, candidates, strict=True)
            )
            found.append(
                LayerSensitivity(
                    layer.name, group.block, member.kind, layer.rows, layer.columns, importance, number, trials
                )
            )
    return found


def _errors(
    prepared: Prepared,
    candidates: Sequence[Candidate],
    source: BlockSource,
    state: Path,
    phase: Callable[[str], None],
) -> Errors:
    """One pass of the engine with a quantizer that delivers nothing."""
    journal, store = Journal(state / "journal.jsonl"), ActivationStore(state, host_memory(prepared))
    Engine(
        skeleton=prepared.skeleton,
        source=source,
        recipe=measuring(prepared.recipe, candidates),
        subsets=prepared.subsets,
        heads=prepared.heads,
        calib=Batches(prepared.calib),
        evaluation=Batches(()),
        sinks=[],
        transformed=None,
        store=store,
        journal=journal,
        device=prepared.device,
        options=EngineOptions(checkpoint_every=len(prepared.skeleton.blocks) + 1),
        listener=_Quiet(phase),
        frame=prepared.frame,
    ).run()
    store.drop_mapped()
    rows = [journal.unit(block_unit(index)) for index in range(len(prepared.skeleton.blocks))]
    return [
        {name: note["trials"] for name, note in row["layers"].items() if "trials" in note} if row is not None else {}
        for row in rows
    ]


def measuring(recipe: Recipe, candidates: Sequence[Candidate]) -> Recipe:
    """The same with the quantizer replaced by one that tries the candidates and delivers nothing."""
    step = Measuring(recipe.steps[-1].algorithm, [candidate.spec for candidate in candidates])
    steps = (*recipe.steps[:-1], Step(step, step.needs(quant_out=None)))
    return replace(recipe, steps=steps, kv=None, observes=False)
