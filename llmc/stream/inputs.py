"""The rotated and quantized inputs of one block's Linears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..linalg import OnlineRotation
from ..quant import ActSpec, InputQuantizer, InputRange

Rotated = Sequence[tuple[nn.Linear, OnlineRotation]]


@dataclass(frozen=True)
class Readers:
    """How an input is rounded.

    Attributes:
        spec: the grid.
        linears: the Linears that read it so.
        sharing: how many of them read one tensor; each expert's Linears read another.
    """

    spec: ActSpec
    linears: Sequence[nn.Linear]
    sharing: int


class BlockInputs:
    """Hooks that rotate what some of a block's Linears read, and round it from the moment on that their subset is
    compressed.

    Args:
        readers: for each subset that has any, by its key, how its input is rounded.
        rotated: the Linears with rotated inputs.
    """

    def __init__(self, readers: Mapping[str, Readers], rotated: Rotated = ()) -> None:
        self._quantizers = {key: InputQuantizer(one.spec, one.sharing) for key, one in readers.items()}
        # In this order they are called: what is rounded is the rotated input.
        self._hooks = [linear.register_forward_pre_hook(_rotating(rotation)) for linear, rotation in rotated]
        self._hooks += [
            linear.register_forward_pre_hook(quantizer)
            for key, quantizer in self._quantizers.items()
            for linear in readers[key].linears
        ]

    def switch_on(self, key: str, found: InputRange | None) -> None:
        """A subset is compressed: its inputs are rounded from now on."""
        if key in self._quantizers:
            self._quantizers[key].switch_on(found)

    @contextmanager
    def rounding(self) -> Iterator[None]:
        """Within the context all inputs are rounded, with dynamic scales."""
        try:
            for key in self._quantizers:
                self.switch_on(key, None)
            yield
        finally:
            for quantizer in self._quantizers.values():
                quantizer.switch_off()

    def restore(self, ranges: Mapping[str, Sequence[float]]) -> None:
        """Switch all subsets on, with the static ranges that ``ranges`` returned in an earlier run."""
        for key in self._quantizers:
            self.switch_on(key, InputRange(*ranges[key]) if key in ranges else None)

    @property
    def found(self) -> dict[str, InputRange]:
        """Calibrated ranges by subset."""
        return {key: one.found for key, one in self._quantizers.items() if one.found is not None}

    @property
    def static(self) -> dict[str, tuple[ActSpec, InputRange]]:
        """The same with their grids."""
        return {key: (self._quantizers[key].spec, found) for key, found in self.found.items()}

    @property
    def ranges(self) -> dict[str, list[float]]:
        """The same as plain values: two float32 numbers each, which JSON keeps exactly."""
        return {key: [found.lo, found.hi] for key, found in self.found.items()}

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _rotating(rotation: OnlineRotation) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return rotation(args[0]), *args[1:]

    return hook
