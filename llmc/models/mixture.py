"""The subsets of a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .adapter import Space, Subset
from .experts import LinearExperts


def experts_of(block: nn.Module, path: str) -> int:
    """How many experts the module ``path`` of a block holds; 0 if there is no such module."""
    experts = dict(block.named_modules()).get(path)
    return experts.count if isinstance(experts, LinearExperts) else 0


def mixture_subsets(
    experts: int,
    *,
    prev: str | None,
    mlp: str = "mlp",
    also: tuple[str, ...] = ("mlp.gate",),
    shared: str | None = None,
    shared_first: bool = False,
    offset: float = 0.0,
    up_passes: bool = True,
) -> tuple[Subset, ...]:
    """The subsets of a mixture of gated feed-forward parts: the first Linears of all, then the last ones.

    Args:
        experts: how many.
        prev: the norm in front.
        mlp: the module of the whole mixture.
        also: the router, and what else reads the norm's output.
        shared: the module of the shared expert, if there is one.
        shared_first: whether it is run before the others.
        offset: what the norm adds to its weight.
        up_passes: whether a scale of an expert's last input passes what stands between it and ``up``.
    """
    path = f"{mlp}.experts"
    gated = [f"{path}.{index}" for index in range(experts)] + ([shared] if shared else [])
    first = tuple(f"{name}.{leaf}" for name in gated for leaf in ("gate_proj", "up_proj"))
    pairs = tuple((f"{name}.gate_proj", f"{name}.up_proj") for name in gated)
    last = [last_linears(path, experts, "up_proj" if up_passes else None)]
    if shared:
        down = f"{shared}.down_proj"
        own = Subset((down,), f"{shared}.up_proj", down, reads="ffn", writes="residual")
        last.insert(0 if shared_first else 1, own)
    return (
        Subset(first, prev, mlp, writes="ffn", also=also, offset=offset, fused=pairs, experts=path),
        *last,
    )


def last_linears(path: str, experts: int, prev: str | None, writes: Space | None = "residual") -> Subset:
    """The last Linears of the experts that the module ``path`` holds; ``prev`` is the one of each that absorbs a scale
    of its own expert's input."""
    names = tuple(f"{path}.{index}.down_proj" for index in range(experts))
    absorber = None if prev is None else f"{path}.*.{prev}"
    apart = tuple((name,) for name in names)
    return Subset(names, absorber, f"{path}.*.down_proj", "ffn", writes, fused=apart, experts=path)


def split(subset: Subset) -> tuple[Subset, ...]:
    """Each expert's share of a subset of experts as a subset of its own, in their order."""
    if subset.experts is None:
        return (subset,)
    found = []
    for names in subset.parts:
        expert = names[0].removeprefix(f"{subset.experts}.").partition(".")[0]
        prev = None if subset.prev is None else subset.prev.replace("*", expert)
        inspect = names[0] if len(names) == 1 else names[0].rpartition(".")[0]
        found.append(
            Subset(names, prev, inspect, subset.reads, subset.writes, offset=subset.offset, fused=subset.fused)
        )
    return tuple(found)


def in_solving_order(subsets: Sequence[Subset]) -> tuple[Subset, ...]:
    """The subsets as whoever looks at each expert's tokens meets them: what a shared expert and the routed ones read
    together is parted, each part right before its own last Linears."""
    found: list[Subset] = []
    waiting: dict[str, Subset] = {}
    for subset in subsets:
        if subset.experts is not None and any(not _is_routed(subset, name) for name in subset.linears):
            waiting |= _parted(subset)
        else:
            owner = "*" if subset.experts is not None else subset.linears[0].rpartition(".")[0]
            if subset.reads == "ffn" and owner in waiting:
                found.append(waiting.pop(owner))
            found.append(subset)
    return (*found, *waiting.values())


def _parted(subset: Subset) -> dict[str, Subset]:
    """The routed experts' part under ``*``, others' under the name of the module that they are of."""
    groups: dict[str, list[str]] = {}
    for name in subset.linears:
        groups.setdefault("*" if _is_routed(subset, name) else name.rpartition(".")[0], []).append(name)
    return {
        owner: Subset(
            tuple(names),
            subset.prev,
            subset.inspect,
            subset.reads,
            subset.writes,
            also=subset.also,
            offset=subset.offset,
            fused=subset.fused,
            experts=subset.experts if owner == "*" else None,
        )
        for owner, names in groups.items()
    }


def _is_routed(subset: Subset, name: str) -> bool:
    return name.startswith(f"{subset.experts}.")
