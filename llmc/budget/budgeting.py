"""A budget of bits: checks it before a weight is read, and turns the choice into ordinary settings of the run."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml

from .. import prepare as preparing
from ..config import LoadedConfig
from ..config.budget import BudgetConfig, candidate_weights
from ..config.schema import QuantConfig
from ..config.tensors import WeightConfig
from ..configuring import load_config
from ..errors import ConfigError, LlmcError
from ..plan import Estimate, bits_per_weight, make_layers, original_bytes, outside_layers
from ..prepare import Prepared, check_exporters, source_of
from ..schemes import weight_spec
from ..stream.headers import headers_digest
from ..translate import make_exporters, make_recipe_of, packing_of
from ..translate_kv import make_kv
from .candidates import Candidate, Group, choose, make_groups, settings
from .sensitivity import Sensitivity, read_sensitivity

_KEY = "quant.mix_bits"


@dataclass(frozen=True)
class Budget:
    """What is to be chosen.

    Attributes:
        asked: the section.
        groups: layers that share a scheme.
        candidates: the schemes.
        losses: of each group with each candidate, where they come from a file; None: to be measured.
    """

    asked: BudgetConfig
    groups: tuple[Group, ...]
    candidates: tuple[Candidate, ...]
    losses: tuple[tuple[float, ...], ...] | None = None

    def describe(self) -> str:
        """For the plan."""
        how = "measured first" if self.losses is None else f"from {self.asked.losses}"
        schemes = ", ".join(one.name for one in self.candidates)
        return f"{self.asked.bits:g} bits per weight out of {schemes}; losses {how}"


@dataclass(frozen=True)
class Settled:
    """A run whose layers all have their schemes.

    Attributes:
        prepared: as if the settings had stood in the file.
        choice: of each group, the candidate's index.
        mix_bits: the same as those settings.
        bits: per weight of the quantized layers.
        loss: nats per token that were expected for the choice.
    """

    prepared: Prepared
    choice: tuple[int, ...]
    mix_bits: Mapping[str, Any]
    bits: float
    loss: float

    def to_dict(self, asked: BudgetConfig) -> dict[str, Any]:
        """Plain values, for ``metrics.json``."""
        plain = {"asked": asked.model_dump(mode="json"), "bits_per_weight": self.bits, "loss": self.loss}
        text = yaml.safe_dump({"mix_bits": dict(self.mix_bits)}, sort_keys=False, default_flow_style=None, width=110)
        return {**plain, "mix_bits": dict(self.mix_bits), "yaml": text}


def make_budget(prepared: Prepared, asked: BudgetConfig) -> Budget:
    """Candidates and groups, all checked against the model and the formats to be saved.

    Raises:
        LlmcError: a candidate doesn't fit the model or can't be stored, the file of losses doesn't fit, or the budget
            is out of range.
    """
    quant = _quant(prepared)
    if prepared.recipe.drop_blocks:
        raise ConfigError(f"{_KEY}.budget: blocks are dropped in the same run", "do one after the other, in two runs")
    groups = make_groups(prepared.layers, prepared.subsets, prepared.recipe)
    found = None
    if asked.losses is not None:
        found = read_sensitivity(asked.losses, headers_digest(prepared.checkpoint.stored))
    weights = candidate_weights(_weight(quant), asked.candidates)
    if found is not None and asked.candidates is None:
        weights = tuple(WeightConfig.model_validate(one["weight"]) for one in found.candidates)
    specs = [weight_spec(weight, quant.act, packing_of(prepared.config, prepared.stored)) for weight in weights]
    candidates = [Candidate(spec.describe(), weight, spec) for weight, spec in zip(weights, specs, strict=True)]
    kept = _storable(prepared, groups, candidates, named=asked.candidates is not None)
    losses = None if found is None else _losses_of(found, groups, kept, str(asked.losses))
    budget = Budget(asked, tuple(groups), tuple(kept), losses)
    if asked.bits is not None:  # whatever the losses, whether the budget is in range
        nothing = [[0.0] * len(kept)] * len(groups)
        choose(groups, [one.spec for one in kept], nothing, prepared.layers, asked.bits)
    return budget


@dataclass(frozen=True)
class Spending:
    """Of a run that has one, its budget.

    Attributes:
        budget: out of which schemes are chosen.
        settled: the choice, where its losses come from a file.
    """

    budget: Budget
    settled: Settled | None = None


def ready(loaded: LoadedConfig) -> tuple[Prepared, Spending | None]:
    """``prepare``, with the budget of the run, if it has one; where the choice is made already, so that the plan is it.

    Raises:
        LlmcError: whatever would stop the run later.
    """
    prepared = preparing.prepare(loaded)
    asked = None if loaded.config.quant is None else loaded.config.quant.bit_budget
    if asked is None:
        return prepared, None
    if asked.bits is None:
        raise ConfigError("quant.bit_budget.bits: missing; so many bits per weight", f"write {_KEY}.budget: 4.25")
    budget = make_budget(prepared, asked)
    if budget.losses is None:
        check_gradients(prepared)
        return replace(prepared, estimate=_with_measuring(prepared)), Spending(budget)
    settled = settle(prepared, budget, budget.losses)
    return settled.prepared, Spending(budget, settled)


def _with_measuring(prepared: Prepared) -> Estimate:
    """What a run needs that measures first: three more readings, and a place for the inputs of all blocks."""
    estimate, skeleton = prepared.estimate, prepared.skeleton
    tokens = sum(batch.tokens.numel() for batch in prepared.calib)
    width, size = skeleton.model.config.get_text_config().hidden_size, skeleton.model.dtype.itemsize
    waiting = (len(skeleton.blocks) + 1) * tokens * width * size
    read = estimate.read + 3 * original_bytes(prepared.checkpoint)
    return replace(estimate, read=read, disk=estimate.disk + waiting)


def check_gradients(prepared: Prepared) -> None:
    """Refuse to measure in float16, where small gradients vanish."""
    if prepared.skeleton.model.dtype == torch.float16:
        raise ConfigError(
            "model.torch_dtype: sensitivity is measured by gradients, for which float16 is too narrow",
            "set model.torch_dtype to torch.bfloat16 or torch.float32",
        )


def settle(prepared: Prepared, budget: Budget, losses: Sequence[Sequence[float]]) -> Settled:
    """Choose by losses, of each group with each candidate."""
    specs = [one.spec for one in budget.candidates]
    choice = choose(budget.groups, specs, losses, prepared.layers, budget.asked.bits or 0.0)
    return chosen(prepared, budget, choice, sum(row[index] for row, index in zip(losses, choice, strict=True)))


def chosen(prepared: Prepared, budget: Budget, choice: Sequence[int], loss: float) -> Settled:
    """The run with a choice that was made: of each group, the candidate's index."""
    mix_bits = settings(_quant(prepared), budget.groups, budget.candidates, choice)
    done = with_settings(prepared, mix_bits)
    return Settled(done, tuple(choice), mix_bits, bits_per_weight(done.layers) or 0.0, loss)


def with_settings(prepared: Prepared, mix_bits: Mapping[str, Any]) -> Prepared:
    """The run as if further settings had stood in its file, and no budget.

    Raises:
        LlmcError: a layer can't have its scheme, or a format can't store it.
    """
    resolved = copy.deepcopy(prepared.loaded.resolved)
    resolved["quant"]["mix_bits"] |= json.loads(json.dumps(mix_bits))
    resolved["quant"]["bit_budget"] = None
    loaded = replace(load_config(resolved), warnings=prepared.loaded.warnings)
    config, skeleton, entries = loaded.config, prepared.skeleton, prepared.entries
    recipe = make_recipe_of(config, prepared.stored, make_kv(config, prepared.heads))
    online = recipe.online(prepared.frame)
    layers = make_layers(skeleton, entries, prepared.heads, prepared.subsets, recipe, online)
    layers += outside_layers(skeleton, entries)
    compute = skeleton.model.dtype
    exporters = make_exporters(config, recipe, layers, prepared.stored, compute, prepared.layout)
    warnings = check_exporters(recipe, online, exporters, layers, source_of(prepared.folder, skeleton))
    warnings = list(dict.fromkeys([*prepared.warnings, *warnings]))
    return replace(prepared, loaded=loaded, recipe=recipe, layers=layers, exporters=exporters, warnings=warnings)


def _storable(
    prepared: Prepared, groups: Sequence[Group], candidates: Sequence[Candidate], *, named: bool
) -> list[Candidate]:
    """The candidates that fit all layers and formats, alone and with one another.

    Args:
        prepared: the run.
        groups: the layers.
        candidates: the schemes.
        named: they are the user's, so that the first that doesn't fit is refused; else it's left out.
    """
    kept: list[Candidate] = []
    refused: list[LlmcError] = []
    for index, candidate in enumerate(candidates):
        try:
            _probe(prepared, groups, [candidate])
        except LlmcError as error:
            if named:
                where = f"{_KEY}.candidates, entry {index} ({candidate.name})"
                raise type(error)(f"{where}: {error.message}", error.remedy) from error
            refused.append(error)
        else:
            kept.append(candidate)
    if not kept:
        raise refused[0]
    if len(kept) == 1:
        raise ConfigError(
            f"{_KEY}.budget: of the usual schemes only {kept[0].name} can be stored: {refused[-1].message}",
            f"name {_KEY}.candidates, or save another format, such as save_fake",
        )
    _probe(prepared, groups, kept)
    return kept


def _probe(prepared: Prepared, groups: Sequence[Group], candidates: Sequence[Candidate]) -> None:
    """Whether a run could have all of these schemes, one after the other."""
    choice = [index % len(candidates) for index in range(len(groups))]
    with_settings(prepared, settings(_quant(prepared), groups, candidates, choice))


def _losses_of(
    found: Sensitivity, groups: Sequence[Group], candidates: Sequence[Candidate], path: str
) -> tuple[tuple[float, ...], ...]:
    """Those that a file has of the groups.

    Raises:
        ConfigError: it lacks a candidate or a layer.
    """
    known = {json.dumps(one["weight"], sort_keys=True): index for index, one in enumerate(found.candidates)}
    wanted = [json.dumps(one.to_dict()["weight"], sort_keys=True) for one in candidates]
    again = "measure it again with this configuration: python -m llmc sensitivity --config FILE"
    for candidate, text in zip(candidates, wanted, strict=True):
        if text not in known:
            there = ", ".join(one["name"] for one in found.candidates)
            raise ConfigError(f"{_KEY}.from: {path} has no losses with {candidate.name}, only with {there}", again)
    layers = {layer.name: layer for layer in found.layers}
    gone = [one.layer.name for group in groups for one in group.members if one.layer.name not in layers]
    if gone:
        raise ConfigError(f"{_KEY}.from: {path} has no losses of {gone[0]}", again)
    return tuple(
        tuple(sum(layers[one.layer.name].trials[known[text]].loss for one in group.members) for text in wanted)
        for group in groups
    )


def losses_of(found: Sensitivity, budget: Budget) -> tuple[tuple[float, ...], ...]:
    """Losses of each group with each candidate, from what was just measured."""
    return _losses_of(found, budget.groups, budget.candidates, "the measurement")


def _quant(prepared: Prepared) -> QuantConfig:
    if prepared.config.quant is None:
        raise ConfigError("quant: missing; there is nothing to choose schemes for", "add a section quant")
    return prepared.config.quant


def _weight(quant: QuantConfig) -> WeightConfig:
    if quant.weight is None:
        raise ConfigError("quant.weight: missing; candidates vary its bits", "add it")
    return quant.weight
