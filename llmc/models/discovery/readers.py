"""Which modules of a block read the same tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..experts import LinearExperts, StackedExperts
from .trial import Key, Run

_CLOSE = 1e-9
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Group:
    """Modules that read one tensor.

    Attributes:
        linears: the block's Linears that can be compressed, in the order of their calls; but those of a mixture's
            experts, which read their tokens' rows, are in front.
        also: others with a weight ``[.., in]``.
        opaque: modules that read it with weights of another form: a mixture's experts in one tensor.
        reader: a module whose first argument it is.
        parts: what the block calls of ``linears``: the Linears, and the mixture's experts as one.
        experts: the module of these.
    """

    linears: tuple[str, ...]
    also: tuple[str, ...]
    opaque: tuple[str, ...]
    reader: str
    parts: tuple[str, ...]
    experts: str | None


@dataclass(frozen=True)
class Readers:
    """All of a block's groups in the order of their first call, and what is in none, with the reason; and for the last
    Linears of each mixture's experts, by its module, how many groups come before them."""

    groups: tuple[Group, ...]
    loose: Mapping[str, str]
    mixtures: Mapping[str, int]


def expert_counts(config: Any) -> frozenset[int]:
    """How many outputs a router may have."""
    return frozenset(n for name in _EXPERT_COUNTS if isinstance(n := getattr(config, name, None), int))


def find_readers(block: nn.Module, run: Run, routers: frozenset[int]) -> Readers:
    """Group a block's modules by the tensor that they read.

    Args:
        block: the module.
        run: of the block.
        routers: Linears with so many outputs beside experts, or with one, only weigh what others make: they aren't
            compressed.
    """
    loose = _called_often(run)
    members: dict[Key, list[str]] = {}
    mixtures: dict[str, int] = {}
    for name, seen in run.seen.items():
        if seen.routed:
            members.setdefault(_key_of_experts(run, name), []).append(name)
            mixtures[name] = len(members)
        elif seen.linear and not _weighs(block, name, seen.outputs[0].shape[-1], routers):
            members.setdefault(seen.inputs[0][0][0], []).append(name)
    grouped = {name for names in members.values() for name in names}
    for name, module in block.named_modules():
        inside = any(name.startswith(f"{path}.") for path in mixtures)
        if isinstance(module, nn.Linear) and name not in run.seen and not inside:
            loose[name] = "it isn't called as a module: another one uses its weights, or nobody does"
        elif name in run.seen and name not in grouped and _is_experts(module):
            loose[name] = "the experts' matrices are kept in one tensor, they aren't Linears"
    groups = tuple(_group(run, key, names) for key, names in members.items())
    return Readers(groups, loose, mixtures)


def _called_often(run: Run) -> dict[str, str]:
    """Why Linears, or experts, that are called several times can't be compressed."""
    often = {
        name: len(seen.inputs)
        for name, seen in run.seen.items()
        if isinstance(seen.module, (nn.Linear, LinearExperts)) and len(seen.inputs) > 1
    }
    return {name: f"it's called {count} times in a block" for name, count in often.items()}


def _group(run: Run, key: Key, names: list[str]) -> Group:
    """Of the modules ``names`` that read a tensor."""
    reading = [name for name, seen in run.seen.items() if seen.reads(key)]
    others = [name for name in reading if name not in names]
    also = tuple(name for name in others if _has_columns(run.seen[name].module, key[3]))
    opaque = tuple(name for name in others if _is_experts(run.seen[name].module))
    routed = [name for name in names if run.seen[name].routed]
    linears = [name for name in names if name not in routed]
    first = [
        f"{path}.{index}.{leaf}"
        for path in routed
        for index in range(_count(run, path))
        for leaf in ("gate_proj", "up_proj")
    ]
    reader = next(name for name in reading if run.seen[name].inputs[0][0][0] == key)
    return Group((*first, *linears), also, opaque, reader, tuple(names), routed[0] if routed else None)


def _count(run: Run, path: str) -> int:
    experts = run.seen[path].module
    return experts.count if isinstance(experts, LinearExperts) else 0


def _key_of_experts(run: Run, path: str) -> Key:
    """The tensor whose rows a mixture's experts read. Where they get copies that the router has weighted, it's the one
    that was copied."""
    key, tensor = run.seen[path].inputs[0][0]
    if not isinstance(run.seen[path].module, StackedExperts):
        return key
    copies = tensor.reshape(_count(run, path), -1, tensor.shape[-1])
    before = list(run.seen)[: list(run.seen).index(path)]
    for name in reversed(before):
        source, original = run.seen[name].inputs[0][0]
        if original.shape[-1] == copies.shape[-1] and _weighted(copies, original.reshape(-1, original.shape[-1])):
            return source
    return key


def _weighted(copies: Tensor, of: Tensor) -> bool:
    """Whether each token of ``[copies, tokens, n]`` is a multiple of that of ``[tokens, n]``."""
    if copies.shape[1:] != of.shape:
        return False
    factor = (copies * of).sum(-1, keepdim=True) / of.square().sum(-1, keepdim=True)
    return bool((copies - factor * of).abs().max() <= _CLOSE * copies.abs().max())


def _weighs(block: nn.Module, name: str, outputs: int, routers: frozenset[int]) -> bool:
    """Whether a Linear is a gate, or chooses among the experts beside it."""
    beside = block.get_submodule(name.rpartition(".")[0]).children()
    return outputs == 1 or (
        outputs in routers
        and any(isinstance(one, (nn.ModuleList, LinearExperts)) or _is_experts(one) for one in beside)
    )


def _is_experts(module: nn.Module) -> bool:
    """Whether a module owns matrices of several experts in one tensor."""
    own = [parameter for parameter in module._parameters.values() if isinstance(parameter, Tensor)]
    convolution = isinstance(getattr(module, "weight", None), Tensor) and hasattr(module, "kernel_size")
    return not convolution and any(parameter.dim() == 3 for parameter in own)


def _has_columns(module: nn.Module, columns: int) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == columns
