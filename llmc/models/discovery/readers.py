"""Which modules of a block read the same tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .trial import Key, Run

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Group:
    """Modules that read one tensor.

    Attributes:
        linears: the block's Linears that can be compressed, in the order of their calls.
        also: others with a weight ``[.., in]``.
        opaque: modules that read it with weights of another form: a mixture's experts in one tensor.
    """

    linears: tuple[str, ...]
    also: tuple[str, ...]
    opaque: tuple[str, ...]


@dataclass(frozen=True)
class Readers:
    """All of a block's groups in the order of their first Linear's call, and what is in none, with the reason."""

    groups: tuple[Group, ...]
    loose: Mapping[str, str]


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
    loose: dict[str, str] = {}
    members: dict[Key, list[str]] = {}
    for name, seen in run.seen.items():
        if seen.linear and not _weighs(block, name, seen.outputs[0].shape[-1], routers):
            members.setdefault(seen.inputs[0][0][0], []).append(name)
        elif isinstance(seen.module, nn.Linear) and len(seen.inputs) > 1:
            loose[name] = f"it's called {len(seen.inputs)} times in a block"
    grouped = {name for names in members.values() for name in names}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and name not in run.seen:
            loose[name] = "it isn't called as a module: another one uses its weights, or nobody does"
        elif name in run.seen and name not in grouped and _is_experts(module):
            loose[name] = "the experts' matrices are kept in one tensor, they aren't Linears"
    groups = []
    for key, names in members.items():
        others = [other for other, seen in run.seen.items() if other not in names and seen.reads(key)]
        columns = key[3]
        also = tuple(other for other in others if _has_columns(run.seen[other].module, columns))
        opaque = tuple(other for other in others if _is_experts(run.seen[other].module))
        groups.append(Group(tuple(names), also, opaque))
    return Readers(tuple(groups), loose)


def _weighs(block: nn.Module, name: str, outputs: int, routers: frozenset[int]) -> bool:
    """Whether a Linear is a gate, or chooses among the experts beside it."""
    beside = block.get_submodule(name.rpartition(".")[0]).children()
    return outputs == 1 or (
        outputs in routers and any(isinstance(one, nn.ModuleList) or _is_experts(one) for one in beside)
    )


def _is_experts(module: nn.Module) -> bool:
    """Whether a module owns matrices of several experts in one tensor."""
    own = [parameter for parameter in module._parameters.values() if isinstance(parameter, Tensor)]
    convolution = isinstance(getattr(module, "weight", None), Tensor) and hasattr(module, "kernel_size")
    return not convolution and any(parameter.dim() == 3 for parameter in own)


def _has_columns(module: nn.Module, columns: int) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == columns
