"""A block's subsets as the steps of a recipe see them: what becomes of each Linear, where its input is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..algorithms import (
    Algorithm,
    AttentionRanges,
    ClipRatios,
    InspectCalls,
    Online,
    Recipe,
    Statistics,
    SubsetView,
    new_statistics,
)
from ..models import Heads, Subset
from ..models.experts import HostMemory
from ..quant import ActSpec, QuantSpec, Scheme, bind_global_scale
from .parts import Unit, watched_modules
from .stages import Observed, Stage

_TOGETHER = 2**30  # bytes of Gram matrices of experts that are solved together


@dataclass(frozen=True)
class Findings:
    """What earlier steps have left for later ones.

    Attributes:
        clips: ranges by Linear.
        pruned: masks ``[out, in]`` of pruned weights by Linear.
        attention: ranges in the block's attention, while it's watched.
    """

    clips: dict[str, ClipRatios]
    pruned: dict[str, Tensor]
    attention: AttentionRanges | None


@dataclass(frozen=True)
class BlockSubsets:
    """What a block's Linears are to become.

    Attributes:
        recipe: what to do.
        index: the block's number.
        block: the module.
        prefix: its name in the model.
        heads: attention geometry.
        online: what runs with the model.
        device: where blocks are run.
        home: where experts' weights are while nobody needs them; None: on the device.
    """

    recipe: Recipe
    index: int
    block: nn.Module
    prefix: str
    heads: Heads
    online: Online
    device: torch.device
    home: HostMemory | None = None

    def linear(self, name: str) -> nn.Linear:
        """A Linear by its name in the block."""
        module = self.block.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{self.prefix}.{name} is a {type(module).__name__}, not a Linear")
        return module

    def schemes_of(self, subset: Subset) -> dict[str, Scheme]:
        """The grids of a subset's Linears and of their inputs."""
        return {name: self.scheme_of(name) for name in subset.linears}

    def scheme_of(self, name: str) -> Scheme:
        """Those of one Linear."""
        return self.recipe.scheme_of(self.index, name, f"{self.prefix}.{name}")

    def act_of(self, subset: Subset) -> ActSpec | None:
        """How a subset's input is rounded, by those of its Linears that round it: they agree."""
        return next((scheme.act for scheme in self.schemes_of(subset).values() if scheme.act is not None), None)

    def stage(self, unit: Unit, algorithm: Algorithm, *, searching: bool) -> Stage:
        """Where the input of a unit is seen, and what is to be known of it."""
        subset, wanted = unit.subset, algorithm.statistics
        inspect = None
        if searching and not unit.experts:
            inspect = self.block.get_submodule(subset.inspect) if subset.inspect else self.block
        columns = self.linear(subset.linears[0]).weight.shape[1]
        act = None if searching else self.act_of(subset)
        return Stage(
            watched_modules(self.block, unit),
            inspect,
            partial(new_statistics, wanted, columns, self.device, act),
            self.online.of_input(subset),
            experts=unit.experts,
            together=max(1, _TOGETHER // (4 * columns**2)) if "gram" in wanted else len(unit.parts),
            scarce=0 if searching else self.recipe.experts.enough(columns),
            ranged=act is not None and act.observer is not None,
            modules=tuple(self.linear(part.linears[0]) for part in unit.parts) if searching and unit.experts else (),
        )

    def enough(self, one: Observed, unit: Unit, algorithm: Algorithm) -> tuple[Statistics, int | None]:
        """The statistics to solve a part with, and, if they aren't its own, how many tokens it should have had: an
        expert that few tokens reach is solved with those that reach any expert of its layer."""
        if algorithm.kind == "transform" or one.pooled is None or one.tokens is None:
            return one.statistics, None
        enough = self.recipe.experts.enough(self.linear(unit.subset.linears[0]).weight.shape[1])
        return (one.statistics, None) if one.tokens >= enough else (one.pooled, enough)

    def view(self, subset: Subset, statistics: Statistics, calls: InspectCalls | None, found: Findings) -> SubsetView:
        """A subset with what a method may read of it."""
        places = {name: (self.index, name, f"{self.prefix}.{name}") for name in subset.linears}
        shares = {name: self.recipe.sparsity_of(*place) for name, place in places.items()}
        sparsity = {name: share for name, share in shares.items() if share is not None}
        schemes = self.schemes_of(subset)
        specs = {name: scheme.weight for name, scheme in schemes.items() if scheme.weight is not None}
        specs = {name: self._bound(spec, name, subset, specs) for name, spec in specs.items()}
        return SubsetView(
            subset=subset,
            linears={name: self.linear(name) for name in subset.linears},
            specs=specs,
            prev=None if subset.prev is None else self.block.get_submodule(subset.prev),
            heads=self.heads,
            stats=statistics,
            calls=calls,
            clips=found.clips,
            sparsity=sparsity,
            pruned=found.pruned,
            act=self.act_of(subset),
            unrounded=frozenset(name for name in specs if schemes[name].act is None),
            clustered=self.recipe.clustered,
            attention=found.attention,
            home=self.home,
        )

    def _bound(self, spec: QuantSpec, name: str, subset: Subset, specs: Mapping[str, QuantSpec]) -> QuantSpec:
        """Linears that backends run as one share a global scale, as NVFP4's."""
        if spec.grid == "int":
            return spec  # there is nothing to share, and nothing to fetch
        weights = [self.linear(other).weight.detach() for other in subset.fused_with(name) if other in specs]
        weights = [weight if self.home is None else self.home.here(weight) for weight in weights]
        return bind_global_scale(spec, weights)
