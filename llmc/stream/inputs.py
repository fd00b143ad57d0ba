"""The quantized inputs of one block's Linears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from ..quant import ActSpec, InputQuantizer, InputRange


class BlockInputs:
    """Hooks that round what a block's Linears read, from the moment on that their subset is compressed.

    Args:
        spec: the grid; None: inputs stay as they are.
        readers: the Linears with quantized inputs of each subset, by the subset's key.
    """

    def __init__(self, spec: ActSpec | None, readers: Mapping[str, Sequence[nn.Linear]]) -> None:
        self._quantizers: dict[str, InputQuantizer] = {}
        for key, linears in readers.items():
            if spec is not None and linears:
                self._quantizers[key] = InputQuantizer(spec, len(linears))
        self._hooks = [
            linear.register_forward_pre_hook(quantizer)
            for key, quantizer in self._quantizers.items()
            for linear in readers[key]
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
    def ranges(self) -> dict[str, list[float]]:
        """The same as plain values: two float32 numbers each, which JSON keeps exactly."""
        return {key: [found.lo, found.hi] for key, found in self.found.items()}

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
