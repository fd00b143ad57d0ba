"""The spaces that a block's Linears read and write: residual, heads, feed-forward, or something between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter import Space
from ..experts import StackedExperts
from .calls import LONG
from .producers import Producer
from .readers import Group
from .trial import Run, Trial, held, working_parts

_CLOSE = 1e-9


@dataclass(frozen=True)
class Spaces:
    """Of one group; ``sources`` are the Linears whose outputs reach its input through no other Linear, unless that is
    the residual."""

    reads: Space
    writes: Space | None
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Map:
    """The spaces of all groups, and that which each mixture's experts write, by their module."""

    groups: tuple[Spaces, ...]
    experts: Mapping[str, Space | None]


@dataclass(frozen=True)
class _Touch:
    """What a change of one Linear's output reaches while all other Linears' outputs stay as they were.

    Attributes:
        groups: numbers of the groups whose input changes.
        mixed: those of which the last token changes though the change isn't at the last token.
        residual: whether the block's output changes by the same, up to a factor.
    """

    groups: frozenset[int]
    mixed: frozenset[int]
    residual: bool


def find_spaces(
    trial: Trial, run: Run, groups: Sequence[Group], producers: Mapping[int, Producer], opaque: Collection[str]
) -> Map:
    """The spaces of each group, and of what experts write.

    Args:
        trial: the block.
        run: of it on ``LONG``.
        groups: the readers.
        producers: by the group's number.
        opaque: modules that do Linears' work without being any.
    """
    working = working_parts(run, opaque)
    residual = _reading_residual(trial, run, groups, producers, working)
    touches = {name: _touch(trial, run, groups, name, working) for group in groups for name in group.parts}
    inner = {index for index in range(len(groups)) if index not in residual}
    mixed = {index for touch in touches.values() for index in touch.mixed}

    def reads(index: int) -> Space:
        if index in residual:
            return "residual"
        producer = producers.get(index)
        linear = producer is not None and isinstance(trial.block.get_submodule(producer.name), nn.Linear)
        if index in mixed:
            return "heads" if linear else "inner"
        onward = any(inner & touches[name].groups for name in groups[index].parts)
        return "inner" if onward or (producer is not None and not linear) else "ffn"

    found = {index: reads(index) for index in range(len(groups))}

    def writes(group: Group) -> Space | None:
        spaces: set[Space] = set()
        for name in group.parts:
            if run.seen[name].routed:
                spaces.add("ffn")  # of the experts' last Linears
                continue
            spaces |= {found[index] for index in inner & touches[name].groups}
            spaces |= {"residual"} if touches[name].residual else set()
        return None if not spaces else spaces.pop() if len(spaces) == 1 else "inner"

    def sources(index: int) -> tuple[str, ...]:
        return tuple(name for name, touch in touches.items() if index in inner & touch.groups)

    def of_experts(touch: _Touch) -> Space | None:
        return "inner" if inner & touch.groups else "residual" if touch.residual else None

    spaces = tuple(Spaces(found[index], writes(group), sources(index)) for index, group in enumerate(groups))
    return Map(spaces, {name: of_experts(touch) for name, touch in touches.items() if run.seen[name].routed})


def _touch(trial: Trial, run: Run, groups: Sequence[Group], name: str, working: Sequence[str]) -> _Touch:
    """Change a Linear's output at every token but the last."""
    output, module = run.seen[name].outputs[0], run.seen[name].module
    shape = (*LONG, output.shape[-1])
    copies = module.count if isinstance(module, StackedExperts) else 1
    if output.numel() != copies * output.shape[-1] * LONG[0] * LONG[1]:
        return _Touch(frozenset(), frozenset(), residual=False)  # it sees only some of the tokens
    generator = torch.Generator().manual_seed(3)
    delta = torch.randn(shape, generator=generator, dtype=torch.float64)
    delta[:, -1] = 0
    with held(run, working, {name: output + delta.expand(copies, *shape).reshape(output.shape)}):
        changed = trial.run(LONG, [group.reader for group in groups])
    touched, mixed = set(), set()
    for index, group in enumerate(groups):
        if name in group.parts:
            continue
        before, after = (one.input_of(group.reader) for one in (run, changed))
        if not _near(before, after):
            touched.add(index)
            by_token = [part.reshape(*LONG, -1)[:, -1] for part in (before, after)]
            if before.numel() == before.shape[-1] * LONG[0] * LONG[1] and not _near(*by_token):
                mixed.add(index)
    return _Touch(frozenset(touched), frozenset(mixed), _same_direction(changed.output - run.output, delta))


def _near(before: Tensor, after: Tensor) -> bool:
    return bool((after - before).abs().max() <= _CLOSE * before.abs().max())


def _same_direction(change: Tensor, delta: Tensor) -> bool:
    """Whether a change is ``delta`` times a number for each token, not all 0."""
    if change.shape != delta.shape:
        return False
    factor = (change * delta).sum(-1, keepdim=True) / delta.square().sum(-1, keepdim=True).clamp_min(1e-300)
    size = change.abs().max()
    return bool(factor.abs().max() > _CLOSE and (change - factor * delta).abs().max() <= _CLOSE * size)


def _reading_residual(
    trial: Trial, run: Run, groups: Sequence[Group], producers: Mapping[int, Producer], working: Sequence[str]
) -> frozenset[int]:
    """Groups that read the residual, or a norm of it.

    With every Linear's output at 0, the residual stays what entered the block, wherever it's read.
    """
    zeros = {name: torch.zeros_like(run.seen[name].outputs[0]) for name in working}
    with held(run, working, zeros):
        silent = trial.run(LONG)
    found = set()
    for index, group in enumerate(groups):
        producer = producers.get(index)
        tensor = silent.input_of(group.reader)
        if producer is not None and not isinstance(trial.block.get_submodule(producer.name), nn.Linear):
            tensor = silent.input_of(producer.name)
        if tensor.numel() == trial.inputs[LONG].numel() and _affine(tensor.reshape(*LONG, -1), trial.inputs[LONG]):
            found.add(index)
    return frozenset(found)


def _affine(tensor: Tensor, of: Tensor) -> bool:
    """Whether each token of ``[batch, tokens, n]`` is a multiple of that of another tensor, plus a constant: the tensor
    itself, or a norm of it without weights."""
    a, b = (one - one.mean(-1, keepdim=True) for one in (tensor, of))
    factor = (a * b).sum(-1, keepdim=True) / b.square().sum(-1, keepdim=True)
    return bool(a.abs().max() > 0 and (a - factor * b).abs().max() <= _CLOSE * a.abs().max())
