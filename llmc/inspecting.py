"""What ``python -m llmc inspect`` shows of a model, from its ``config.json`` alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .architecture import check_linears, explore
from .errors import LlmcError, ModelError
from .models import BlockFacts, Discovery, ModelAdapter, Subset, check_reorderable, declared, residual_of
from .models.locate import locate_checkpoint
from .stream.attention import check_attention
from .stream.empty import empty_model, load_config

transformers_logging: Any = logging  # parts of it have no annotations


@dataclass(frozen=True)
class InspectedSubset:
    """A subset with the shapes ``(out, in)`` of its Linears, and why nothing absorbs a scale, if nothing does."""

    subset: Subset
    shapes: tuple[tuple[int, int], ...]
    reason: str | None


@dataclass(frozen=True)
class BlockGroup:
    """Blocks that look alike.

    Attributes:
        blocks: their numbers.
        kind: class of the first.
        parameters: of each.
        subsets: of each.
        loose: why modules that do Linears' work are in no subset, by their names in the block.
        differences: between what was declared and what was discovered.
    """

    blocks: tuple[int, ...]
    kind: str
    parameters: int
    subsets: tuple[InspectedSubset, ...]
    loose: tuple[tuple[str, str], ...]
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """Everything that is shown of a model.

    Attributes:
        model: as it was asked for.
        architecture: class of the model.
        model_type: that of its configuration.
        adapter: name of the declared one; None: discovery took its place.
        path: of the list of blocks.
        head: modules behind the last block.
        groups: the blocks, those that look alike together.
        parameters: of the whole model, shared ones once.
        compressible: of the Linears in subsets.
        refused: what can't be done, and why.
        problem: why the model can't be compressed at all.
    """

    model: str
    architecture: str
    model_type: str
    adapter: str | None
    path: str
    head: tuple[str, ...]
    groups: tuple[BlockGroup, ...]
    parameters: int
    compressible: int
    refused: tuple[tuple[str, str], ...]
    problem: str | None


def inspect_model(path: str, *, trust_remote_code: bool = False) -> Inspection:
    """Look at a model without reading a weight.

    Args:
        path: a folder or a hub id.
        trust_remote_code: consent to running the model's own code.

    Raises:
        LlmcError: there is no such model, or it isn't one with blocks.
    """
    transformers_logging.set_verbosity_error()  # it warns of what isn't asked for here
    folder = locate_checkpoint(path, trust_remote_code=trust_remote_code, weights=False)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    found = explore(config, trust_remote_code=trust_remote_code)
    model = empty_model(config, torch.float32, trust_remote_code=trust_remote_code)
    adapter, problem = declared(config.model_type), None
    served = adapter
    if adapter is None:
        try:
            served = found.adapter()
        except ModelError as error:
            problem = error.message
    text, groups, refused = config.get_text_config(), [], []
    blocks = model.get_submodule(served.blocks if served is not None else found.path)
    if served is not None:
        subsets = served.block_subsets(text, blocks)
        groups = _groups(blocks, subsets, found, compare=adapter is not None)
        refused = _refused(model, blocks, text, served, subsets)
    linears = sum(len(g.blocks) * rows * columns for g in groups for s in g.subsets for rows, columns in s.shapes)
    return Inspection(
        model=path,
        architecture=type(model).__name__,
        model_type=config.model_type,
        adapter=None if adapter is None else adapter.name,
        path=served.blocks if served is not None else found.path,
        head=tuple(name for name in (served.head if served is not None else found.head) if _has(model, name)),
        groups=tuple(groups),
        parameters=_total(model),
        compressible=linears,
        refused=tuple(refused),
        problem=problem or (found.problem if adapter is not None else None),
    )


def _total(model: Any) -> int:
    """Parameters of a model; what is tied to another counts once, though nothing is shared without weights."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name not in tied)


def _has(model: nn.Module, name: str) -> bool:
    return any(name == other for other, _ in model.named_modules())


def _groups(
    blocks: nn.ModuleList, subsets: Sequence[tuple[Subset, ...]], found: Discovery, *, compare: bool
) -> list[BlockGroup]:
    """Blocks with the same subsets and shapes, in the order of their first."""
    members: dict[Any, list[int]] = {}
    for index, block in enumerate(blocks):
        facts = found.blocks[index] if found.blocks else BlockFacts()
        kind = (subsets[index], _shapes(block, subsets[index]), _parameters(block), tuple((facts.loose or {}).items()))
        members.setdefault(kind, []).append(index)
    return [
        _group(blocks[numbers[0]], numbers, subsets[numbers[0]], found, compare=compare) for numbers in members.values()
    ]


def _group(
    block: nn.Module, numbers: list[int], subsets: tuple[Subset, ...], found: Discovery, *, compare: bool
) -> BlockGroup:
    facts = found.blocks[numbers[0]] if found.blocks else BlockFacts(problem=found.problem)
    reasons = facts.reasons or {}
    shown = tuple(
        InspectedSubset(
            one, shapes, None if one.prev is not None else reasons.get(one.key, "nobody declared who could")
        )
        for one, shapes in zip(subsets, _shapes(block, subsets), strict=True)
    )
    loose = tuple((facts.loose or {}).items())
    differences = tuple(differ(subsets, facts)) if compare else ()
    kind, size = type(block).__name__, _parameters(block)
    return BlockGroup(tuple(numbers), kind, size, shown, loose, differences)


def _shapes(block: nn.Module, subsets: Sequence[Subset]) -> tuple[tuple[tuple[int, int], ...], ...]:
    def shape(name: str) -> tuple[int, int]:
        module = block.get_submodule(name)
        rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
        return rows, columns

    return tuple(tuple(shape(name) for name in subset.linears) for subset in subsets)


def _parameters(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


def differ(subsets: Sequence[Subset], facts: BlockFacts) -> list[str]:
    """What was declared of a block that discovery doesn't find, or finds otherwise."""
    if facts.problem is not None:
        return [f"discovery can't say: {facts.problem}"]
    named = {subset.linears: subset for subset in facts.subsets}
    lines = []
    for one in subsets:
        other = named.pop(one.linears, None)
        name = one.key.replace("+", ", ")
        if other is None:
            lines.append(f"{name}: declared, but discovery doesn't find that they share an input")
            continue
        pairs = {
            field: (getattr(one, field), getattr(other, field))
            for field in ("prev", "inspect", "also", "rows", "offset", "reads", "writes")
        }
        if other.writes is None:
            del pairs["writes"]
        lines += [f"{name}: {field} declared {a!r}, discovered {b!r}" for field, (a, b) in pairs.items() if a != b]
    left = [other.key.replace("+", ", ") for other in named.values()]
    return lines + [f"{name}: discovered, but not declared" for name in left]


def _refused(
    model: nn.Module,
    blocks: nn.ModuleList,
    text: Any,
    adapter: ModelAdapter,
    subsets: Sequence[tuple[Subset, ...]],
) -> list[tuple[str, str]]:
    """Methods that this architecture doesn't allow, with the reason that a run would give."""
    checks: dict[str, Callable[[], object]] = {
        "compression": lambda: check_linears(blocks, subsets),
        "rotation (QuaRot)": lambda: residual_of(adapter, text, {subset for own in subsets for subset in own}),
        "reordering (RPTQ)": lambda: reorderable(subsets),
        "quantized KV cache": lambda: check_attention(model),
    }

    def reorderable(blocks: Sequence[tuple[Subset, ...]]) -> None:
        for own in dict.fromkeys(blocks):
            check_reorderable(own)

    found = []
    for what, check in checks.items():
        try:
            check()
        except LlmcError as error:
            found.append((what, error.message))
    return found
