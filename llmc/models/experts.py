"""The experts of a mixture as Linears: Transformers keeps them in two three-dimensional parameters, which no algorithm
could read one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Subset


@dataclass(frozen=True)
class RoutedInputs:
    """What the experts of a layer read of one batch.

    Attributes:
        of: rows ``[tokens, in]`` that an expert reads.
        tokens: how many they are.
        common: whether all experts read the same rows.
    """

    of: Callable[[int], Tensor]
    tokens: Callable[[int], int]
    common: bool = False


class Port(nn.Module):
    """A place between two operations of a layer of experts where somebody may look at what comes next, or wait."""

    def forward(self, inputs: RoutedInputs) -> None:
        """Do nothing. A forward pre-hook sees ``inputs``."""


class Expert(nn.Module):
    """A gated feed-forward part: three Linears."""

    def __init__(self, hidden: int, inner: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
        self.up_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
        self.down_proj = nn.Linear(inner, hidden, bias=bias, dtype=dtype)


class LinearExperts(nn.Module):
    """Computes what the module that it replaces does, by the same operations in the same order, one expert at a time.

    All inputs of the first Linears are known when ``entrance`` is called, all those of the last when ``between`` is.
    The weights may be on another device than the tokens: they are then moved there one expert at a time.

    Args:
        fused: an experts module of Transformers with ``gate_up_proj`` and ``down_proj`` of all experts.

    Attributes:
        all_tokens: whether the ports show all tokens to every expert, whether or not they are routed to it.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        transposed = _is_transposed(fused)
        count, hidden, both = fused.gate_up_proj.shape if transposed else fused.gate_up_proj.transpose(1, 2).shape
        bias = getattr(fused, "gate_up_proj_bias", None) is not None
        self.count = count
        self.all_tokens = False
        for expert in range(count):
            self.add_module(str(expert), Expert(hidden, both // 2, bias=bias, dtype=fused.gate_up_proj.dtype))
        self.entrance, self.between = Port(), Port()
        self._activate: Callable[[Tensor, Tensor], Tensor]
        self.__dict__["_activate"] = _activation(fused)

    def expert(self, index: int) -> Expert:
        """One of them."""
        found = self.get_submodule(str(index))
        if not isinstance(found, Expert):
            raise TypeError(f"{index} isn't an expert")
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Route ``[tokens, hidden]`` by indices and weights ``[tokens, chosen]``; summed over experts in that shape."""
        routes = [torch.where((top_k_index == expert).T)[::-1] for expert in range(self.count)]
        products = self._products(hidden_states, [tokens for tokens, _ in routes])
        result = torch.zeros_like(hidden_states)
        for index, (tokens, slots) in enumerate(routes):
            if len(tokens):
                output = self.expert(index).down_proj(products[index])
                output = output * top_k_weights[tokens, slots, None]
                result.index_add_(0, tokens, output.to(result.dtype))
        return result

    def _products(self, hidden: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
        """What the last Linears read, ``[tokens of the expert, inner]`` each."""
        everyone = self.all_tokens
        self.entrance(
            RoutedInputs(
                lambda index: hidden if everyone else hidden[rows[index]],
                lambda index: len(hidden) if everyone else len(rows[index]),
                everyone,
            )
        )
        products = [self.inner(index, hidden[tokens]) for index, tokens in enumerate(rows)]
        self.between(
            RoutedInputs(
                lambda index: self.inner(index, hidden) if everyone else products[index],
                lambda index: len(hidden) if everyone else len(rows[index]),
            )
        )
        return products

    def inner(self, index: int, inputs: Tensor) -> Tensor:
        """What the last Linear of an expert reads, ``[tokens, inner]``, given its first ones' input."""
        expert = self.expert(index)
        activated: Tensor = self._activate(expert.gate_proj(inputs), expert.up_proj(inputs))
        return activated


class StackedExperts(LinearExperts):
    """The same where each token has been multiplied by its weight beforehand, a copy for every expert (Llama 4)."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Of ``[experts * tokens, hidden]`` those rows that aren't 0 are routed; outputs in the same places."""
        by_expert = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        routed = (by_expert != 0).any(-1)
        flat = [torch.where(own)[0] + index * by_expert.shape[1] for index, own in enumerate(routed)]
        products = self._products(hidden_states, flat)
        result = torch.zeros_like(hidden_states)
        for index, rows in enumerate(flat):
            if len(rows):
                result[rows] = self.expert(index).down_proj(products[index])
        return result


def _is_transposed(fused: Any) -> bool:
    """Whether its matrices are ``[in, out]``."""
    known = getattr(fused, "is_transposed", None)
    return bool(known) if known is not None else fused.gate_up_proj.shape[1] == fused.down_proj.shape[2]


def _activation(fused: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """What becomes of the outputs of gate and up."""
    act = getattr(fused, "act_fn", None)
    if act is not None:
        return lambda gate, up: act(gate) * up
    apply_gate = fused._apply_gate  # of an interleaved pair (gpt-oss)
    return lambda gate, up: apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))


def linearize_experts(model: nn.Module) -> list[str]:
    """Replace the experts of every layer by Linears, in place; names of the replaced modules.

    Where the router weights the tokens in front of the experts, they get one tensor of weighted copies instead of the
    routing.
    """
    found = []
    for name, module in list(model.named_modules()):
        parts = (getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None))
        if all(isinstance(part, nn.Parameter) and part.dim() == 3 for part in parts):
            routed = hasattr(module, "is_transposed")  # the mark of Transformers' interface of routed experts
            model.set_submodule(name, LinearExperts(module) if routed else StackedExperts(module))
            found.append(name)
    return found


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
    last = [
        Subset(
            tuple(f"{path}.{index}.down_proj" for index in range(experts)),
            f"{path}.*.up_proj" if up_passes else None,
            f"{path}.*.down_proj",
            reads="ffn",
            writes="residual",
            fused=tuple((f"{path}.{index}.down_proj",) for index in range(experts)),
            experts=path,
        )
    ]
    if shared:
        down = f"{shared}.down_proj"
        own = Subset((down,), f"{shared}.up_proj", down, reads="ffn", writes="residual")
        last.insert(0 if shared_first else 1, own)
    return (
        Subset(first, prev, mlp, writes="ffn", also=also, offset=offset, fused=pairs, experts=path),
        *last,
    )


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
