"""The schemes that a budget may be spent on, the layers that must share one, and what the choice is in YAML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..algorithms import Recipe, first_scheme
from ..config.schema import QuantConfig
from ..config.tensors import WeightConfig
from ..errors import ConfigError
from ..export import Layer, expert_layer
from ..models import Subset
from ..plan import layer_bits
from ..quant import QuantSpec
from .allocation import Option, allocate
from .sensitivity import collapsed_kind

PREFIX = "budget_"


@dataclass(frozen=True)
class Candidate:
    """A scheme of weights.

    Attributes:
        name: such as ``W3 g64 asym``.
        weight: its section ``quant.weight``.
        spec: its grid.
    """

    name: str
    weight: WeightConfig
    spec: QuantSpec

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``sensitivity.json``."""
        return {"name": self.name, "weight": self.weight.model_dump(mode="json", exclude_defaults=True)}


@dataclass(frozen=True)
class Member:
    """A layer of a group, and its name inside the block."""

    layer: Layer
    kind: str


@dataclass(frozen=True)
class Group:
    """Layers of a block that get one scheme, since a backend runs them as one."""

    block: int
    members: tuple[Member, ...]

    @property
    def weights(self) -> int:
        """How many there are."""
        return sum(member.layer.rows * member.layer.columns for member in self.members)

    def bits(self, spec: QuantSpec) -> int:
        """Bits of all with a grid, scales and zero points included."""
        return round(sum(layer_bits(member.layer, spec) for member in self.members))


def make_groups(layers: Sequence[Layer], subsets: Sequence[tuple[Subset, ...]], recipe: Recipe) -> list[Group]:
    """The layers whose scheme is to be chosen: all that are quantized and that no setting has fixed.

    Linears that backends fuse (q, k, v; gate, up) are one group, and so are all experts of a block.
    """
    places = [(index, name) for index, own in enumerate(subsets) for subset in own for name in subset.linears]
    groups: dict[tuple[int, object], list[Member]] = {}
    for (block, kind), layer in zip(places, layers, strict=False):  # what is outside of the blocks comes behind
        if layer.spec is not None and first_scheme(recipe.rules, block, kind) is None:
            groups.setdefault((block, expert_layer(layer.name) or layer.fused), []).append(Member(layer, kind))
    return [Group(block, tuple(members)) for (block, _), members in groups.items()]


def choose(
    groups: Sequence[Group],
    specs: Sequence[QuantSpec],
    losses: Sequence[Sequence[float]],
    layers: Sequence[Layer],
    bits: float,
) -> list[int]:
    """The candidate of each group: the least sum of losses that a budget has room for.

    Args:
        groups: layers that share a scheme.
        specs: the candidates.
        losses: of each group, with each candidate.
        layers: all of the model; those that are quantized and in no group count with what they take.
        bits: budget, per weight of all quantized layers.

    Raises:
        ConfigError: the budget is too small for the candidates, or larger than they can fill.
    """
    sizes = [[group.bits(spec) for spec in specs] for group in groups]
    room = _room(groups, sizes, layers, bits)
    options = [[Option(*one) for one in zip(row, own, strict=True)] for row, own in zip(losses, sizes, strict=True)]
    return allocate(options, room)


def _room(groups: Sequence[Group], sizes: Sequence[Sequence[int]], layers: Sequence[Layer], bits: float) -> int:
    """Bits that the groups may take in sum."""
    if not groups:
        raise ConfigError("quant.mix_bits.budget: there is no layer whose scheme could be chosen", "remove the budget")
    free = {member.layer.name for group in groups for member in group.members}
    fixed = [layer for layer in layers if layer.spec is not None and layer.name not in free]
    weights = sum(group.weights for group in groups) + sum(layer.rows * layer.columns for layer in fixed)
    taken = round(sum(layer_bits(layer, layer.spec) for layer in fixed if layer.spec is not None))
    least, most = ((taken + sum(map(pick, sizes))) / weights for pick in (min, max))
    if not least - 1e-9 <= bits <= most + 1e-9:
        kept = ", with the settings beside it," if fixed else ""
        raise ConfigError(
            f"quant.mix_bits.budget: {bits:g} bits per weight, but the candidates{kept} take from {least:.4f} to "
            f"{most:.4f}, scales and zero points included",
            "name a budget in between, or other candidates",
        )
    return int(bits * weights + 1e-9 * weights) - taken


def settings(
    quant: QuantConfig, groups: Sequence[Group], candidates: Sequence[Candidate], choice: Sequence[int]
) -> dict[str, Any]:
    """The choice as named settings of ``quant.mix_bits``, in plain values."""
    act = None if quant.act is None else quant.act.model_dump(mode="json", exclude_defaults=True)
    found: dict[str, Any] = {}
    for index, candidate in enumerate(candidates):
        own = [group for group, chosen in zip(groups, choice, strict=True) if chosen == index]
        if own:
            name = PREFIX + candidate.name.lower().replace(" ", "_")
            scheme = {"weight": candidate.to_dict()["weight"], **({} if act is None else {"act": act})}
            found[name] = {"layer_name": list(_names(own)), **scheme}
    return found


def _names(groups: Sequence[Group]) -> Iterator[str]:
    """Names of layers with the numbers of their blocks, as ``layer_name`` has them."""
    blocks: dict[str, list[int]] = {}
    for group in groups:
        for kind in dict.fromkeys(_pattern(member) for member in group.members):
            blocks.setdefault(kind, []).append(group.block)
    for kind, numbers in blocks.items():
        yield f"{kind}#{_ranges(sorted(numbers))}"


def _pattern(member: Member) -> str:
    """Experts of a block are in one group: a star stands for their numbers."""
    return collapsed_kind(member.kind) if expert_layer(member.layer.name) else member.kind


def _ranges(numbers: Sequence[int]) -> str:
    """``0..2-5`` for 0, 1, 2 and 5."""
    starts = [numbers[0], *(after for before, after in pairwise(numbers) if after > before + 1)]
    ends = [*(before for before, after in pairwise(numbers) if after > before + 1), numbers[-1]]
    return "-".join(f"{a}" if a == b else f"{a}..{b}" for a, b in zip(starts, ends, strict=True))
