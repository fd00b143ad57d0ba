"""Which experts' weights are on the device, where a block is too large for it and they stay in the host's memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from ..algorithms import SubsetView
from ..models import Subset
from ..models.experts import HostMemory, LinearExperts, fetched_again, working_on
from ..quant import QWeight
from .parts import Unit

_TOGETHER = 2**30  # bytes of weights, as float32, of experts that are worked on together

_T = TypeVar("_T")
_Module = TypeVar("_Module", bound=nn.Module)
_Kept = TypeVar("_Kept", Tensor, QWeight)


@dataclass(frozen=True)
class Visits:
    """Brings experts to the device while somebody works on them, a group at a time.

    Attributes:
        block: whose experts.
        home: where they stay meanwhile; None: on the device.
    """

    block: nn.Module
    home: HostMemory | None

    @classmethod
    def of(cls, block: nn.Module) -> Visits:
        """Those of a loaded block."""
        homes = (module.home for module in block.modules() if isinstance(module, LinearExperts))
        return cls(block, next((home for home in homes if home is not None), None))

    def groups(self, unit: Unit, parts: Sequence[_T]) -> Iterator[Sequence[_T]]:
        """So many of a unit's parts at a time as are worked on together. It's the same wherever experts stay, so that
        results are, too."""
        if not unit.experts:
            yield parts
            return
        size = sum(_size(self.block.get_submodule(name)) for name in unit.parts[0].linears)
        together = max(1, _TOGETHER // (4 * size))
        for start in range(0, len(parts), together):
            yield parts[start : start + together]

    def during(self, unit: Unit, views: Sequence[SubsetView]) -> AbstractContextManager[None]:
        """Within the context the Linears of some views are on the device, and may be given other weights.

        A unit that is a whole layer of experts stays where it is if the device has no room for it: the views bring its
        weights one by one.
        """
        linears = [linear for view in views for linear in view.linears.values()]
        if not unit.experts and self._stays(unit.subset) and not self._has_room(linears):
            return nullcontext()
        return working_on(self.block, linears)

    def for_gradients(self) -> AbstractContextManager[None]:
        """Within the context gradients go through the block. Where the device has no room for all of its experts, they
        visit on the way back as on the way forth."""
        linears = [module for module in self.block.modules() if isinstance(module, nn.Linear)]
        return working_on(self.block, linears) if self._has_room(linears) else fetched_again(self.block)

    def one_by_one(self, modules: Iterable[_Module]) -> Iterator[_Module]:
        """Modules, each on the device until the next one is asked for."""
        for module in modules:
            with working_on(self.block, [module]):
                yield module

    def kept(self, subset: Subset, finished: _Kept) -> _Kept:
        """The codes of a Linear, or what a pruner has made 0 of it, where it may stay until the block is written."""
        return finished.to("cpu") if self._stays(subset) else finished

    def _stays(self, subset: Subset) -> bool:
        """Whether weights of a subset are in the host's memory while nobody needs them."""
        return self.home is not None and subset.experts is not None

    def _has_room(self, linears: Iterable[nn.Linear]) -> bool:
        """Whether all weights of these may be on the device together."""
        return self.home is None or self.home.has_room_for(sum(linear.weight.nbytes for linear in linears))


def _size(module: nn.Module) -> int:
    return module.weight.numel() if isinstance(module, nn.Linear) else 0
