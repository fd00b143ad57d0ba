"""What made a tensor: which rows of which Linear, or which norm, its channels are proportional to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from ..adapter import Heads, Subset
from ..fold import fold_scale, scale_rule
from .calls import LONG, SHORT
from .exact import own_weights, scaled_inputs, scaled_norm
from .readers import Group
from .trial import Run, Seen, Trial, held, working_parts

_OFFSETS = (0.0, 1.0)  # norms multiply by their weight, or by 1 + it
_PARTS = ("all", "first half", "second half", "even", "odd")  # of a Linear's rows
_CLOSE = 1e-8
_PRESERVED = 1e-10


@dataclass(frozen=True)
class Producer:
    """Who makes a tensor.

    Attributes:
        name: the norm or Linear.
        row_of: for each channel of the tensor the row of the producer's weight that alone decides its size, int64.
        offset: what a norm adds to its weight.
    """

    name: str
    row_of: Tensor
    offset: float = 0.0


def find_producers(trial: Trial, run: Run, groups: Sequence[Group], opaque: Collection[str]) -> dict[int, Producer]:
    """Who makes the tensors that groups of Linears read, by the group's number; absent where nobody does.

    Each row of a candidate's weight is multiplied by a factor of its own: a channel that changes by exactly one of the
    factors, for all tokens, is made by that row. Norms in front mix what was scaled, activations such as GELU don't
    keep the ratio, ReLU does. Sequences have a single token: attention then passes values on, whatever queries and keys
    are. The nearest candidate in front counts. Halves of a Linear, and every other row, are tried by themselves: of a
    gate and what it's multiplied by in one Linear only the latter keeps the ratio. All other Linears' outputs stay as
    they were: what reaches the tensor through them is left to ``fold_problem``.

    Args:
        trial: the block.
        run: of it on ``SHORT``.
        groups: the readers.
        opaque: modules that do Linears' work without being any.
    """
    order, working = list(run.seen), working_parts(run, opaque)
    found: dict[int, Producer] = {}
    for candidate in reversed(order):
        module = run.seen[candidate].module
        wanted = {
            index: group
            for index, group in enumerate(groups)
            if index not in found and order.index(candidate) < order.index(group.reader)
        }
        if wanted and _can_scale(run.seen[candidate]):
            with held(run, working, {}):
                found |= _made_by(trial, run, candidate, module, wanted)
    return found


def _can_scale(seen: Seen) -> bool:
    weight = seen.module._parameters.get("weight")
    return isinstance(weight, Tensor) and seen.single and (weight.dim() == 1 or seen.linear)


def _made_by(
    trial: Trial, run: Run, candidate: str, module: nn.Module, wanted: Mapping[int, Group]
) -> dict[int, Producer]:
    norm, rows = _weight(module).dim() == 1, len(_weight(module))
    factors = 1 + (torch.arange(rows, dtype=torch.float64) + 1) / (2 * rows)
    trials = [(torch.where(_part(rows, part), factors, 1.0), 0.0) for part in _PARTS]
    if norm:
        trials = [(factors, offset) for offset in _OFFSETS]
    found: dict[int, Producer] = {}
    for scales, offset in trials:
        left = {index: group for index, group in wanted.items() if index not in found}
        if not left:
            break
        output = run.seen[candidate].outputs[0]
        with scaled_norm(module, scales, offset) if norm else held(run, [candidate], {candidate: output * scales}):
            changed = trial.run(SHORT, [group.reader for group in left.values()])
        for index, group in left.items():
            row_of = _rows_behind(run.input_of(group.reader), changed.input_of(group.reader), rows)
            if row_of is not None:
                found[index] = Producer(candidate, row_of, offset)
    return found


def _part(rows: int, part: str) -> Tensor:
    """Which of a Linear's rows are in a part, bool ``[rows]``."""
    row = torch.arange(rows)
    masks = {"first half": row < rows // 2, "second half": row >= rows // 2, "even": row % 2 == 0, "odd": row % 2 == 1}
    return masks.get(part, torch.ones(rows, dtype=torch.bool))


def _rows_behind(before: Tensor, after: Tensor, rows: int) -> Tensor | None:
    """The row ``[channels]`` whose factor each channel was multiplied by; None if some channel wasn't by any."""
    before, after = before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])
    telling = before.abs() > 1e-4 * before.abs().amax()
    if not telling.any(0).all():
        return None
    ratio = torch.where(telling, after / before, torch.nan)
    mean = ratio.nanmean(0)
    steady = torch.where(telling, (ratio - mean).abs(), torch.zeros_like(ratio)).amax(0) < _CLOSE
    row = ((mean - 1) * 2 * rows).round().long() - 1
    exact = (mean - 1 - (row.double() + 1) / (2 * rows)).abs() < _CLOSE
    return row if bool((steady & exact & (row >= 0) & (row < rows)).all()) else None


def ranges_of(rows: Tensor) -> tuple[tuple[int, int], ...]:
    """Runs ``(start, stop)`` of following numbers in an int64 vector."""
    cuts = [0, *((rows[1:] - rows[:-1] != 1).nonzero().flatten() + 1).tolist(), len(rows)]
    return tuple((int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(cuts))


@dataclass(frozen=True)
class Absorber:
    """Fields of a ``Subset`` that a producer gives, and the attention's geometry if channels share its rows."""

    prev: str
    rows: tuple[tuple[int, int], ...] | None
    offset: float
    heads: Heads | None


def absorber_of(producer: Producer, module: nn.Module) -> Absorber | str:
    """What a producer can absorb, or why it can't."""
    weight = _weight(module)
    row_of = producer.row_of
    own = torch.unique(row_of)
    if weight.dim() == 1:
        if len(own) < len(row_of) or not torch.equal(own, row_of):
            return f"several channels share a weight of {producer.name}"
        return Absorber(producer.name, None, producer.offset, None)
    heads = None
    if len(own) < len(row_of):
        heads = _grouped(row_of, len(own))
        if heads is None:
            return f"several channels share a row of {producer.name}, not as in grouped-query attention"
        row_of = row_of.view(heads.kv, heads.query // heads.kv, heads.dim)[:, 0].reshape(-1)
    ranges = ranges_of(row_of)
    return Absorber(producer.name, None if ranges == ((0, len(weight)),) else ranges, 0.0, heads)


def _grouped(row_of: Tensor, rows: int) -> Heads | None:
    """Geometry if each run of rows serves several heads that follow one another."""
    again = (row_of == row_of[0]).nonzero().flatten()
    dim, query = int(again[1]), len(row_of) // int(again[1])
    if rows % dim or len(row_of) % dim or query % (rows // dim):
        return None
    kv = rows // dim
    by_head = row_of.view(kv, query // kv, dim)
    return Heads(query, kv, dim) if torch.equal(by_head, by_head[:, :1].expand_as(by_head)) else None


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module._parameters["weight"])  # has one, or it would be no candidate


def fold_problem(trial: Trial, subset: Subset, heads: Heads, before: Tensor) -> str | None:
    """Why folding a random scale into ``prev`` doesn't leave the block's output ``before``, on ``LONG``, as it was;
    None: it does.

    The first Linears of a mixture's experts get a scaled input, which is the same as scaled columns: copies of all
    their weights would take much memory.
    """
    prev = trial.block.get_submodule(str(subset.prev))
    names = (*subset.linears, *subset.also)
    routed = [name for name in names if subset.experts is not None and name.startswith(f"{subset.experts}.")]
    readers = [trial.block.get_submodule(name) for name in names if name not in routed]
    columns = _weight(trial.block.get_submodule(names[0])).shape[1]
    rule = scale_rule(subset, prev, columns, heads, allow_gqa=True)
    if rule is None:
        return f"the rows of {subset.prev} don't fit the attention's heads"
    generator = torch.Generator().manual_seed(2)
    scale = rule.tie(torch.exp2(torch.rand(columns, generator=generator, dtype=torch.float64) * 2 - 1))
    experts = [trial.block.get_submodule(name) for name in routed]
    with own_weights([prev, *readers]), scaled_inputs(experts, scale):
        fold_scale(prev, readers, scale, rule, torch.float64)
        after = trial.output(LONG)
    if (after - before).abs().max() <= _PRESERVED * before.abs().max():
        return None
    return f"{subset.prev} makes it, but something else depends on that, too"
