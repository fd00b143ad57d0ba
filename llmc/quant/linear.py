"""Fake quantization of a Linear's input inside a running model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .activations import ActSpec, InputRange, fake_quantize_inputs


class InputQuantizer:
    """A forward pre-hook of all Linears that read one tensor. It passes inputs through until it is switched on.

    The Linears of a subset are called with the same tensor one after another, so the last result is kept for the next.

    Args:
        spec: the grid.
    """

    def __init__(self, spec: ActSpec) -> None:
        self.spec = spec
        self.found: InputRange | None = None
        self._on = False
        self._last: tuple[Tensor, Tensor] | None = None

    def switch_on(self, found: InputRange | None) -> None:
        """Quantize from now on, with the calibrated range if the grid is static.

        Raises:
            ValueError: a static grid without a range.
        """
        if self.spec.observer is not None and found is None:
            raise ValueError(f"{self.spec.describe()} needs a calibrated range")
        self.found, self._on, self._last = found, True, None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments with the first one, the input, rounded; None to leave them."""
        if not self._on:
            return None
        inputs = args[0]
        if self._last is None or self._last[0] is not inputs:
            self._last = inputs, fake_quantize_inputs(inputs, self.spec, self.found)
        return (self._last[1], *args[1:])
