"""Fake quantization of a Linear's input inside a running model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .activations import ActSpec, InputRange, fake_quantize_inputs
from .straight import straight_through


class InputQuantizer:
    """A forward pre-hook of all Linears that read one tensor. It passes inputs through until it is switched on.

    The Linears of a subset are called with the same tensor one after another, so a result is kept for the rest of them.
    Where gradients are wanted they pass the rounding as if it weren't there.

    Args:
        spec: the grid.
        readers: how many Linears share it.
    """

    def __init__(self, spec: ActSpec, readers: int = 1) -> None:
        self.spec = spec
        self.found: InputRange | None = None
        self._on = False
        self._readers = readers
        self._kept: _Rounded | None = None

    def switch_on(self, found: InputRange | None) -> None:
        """Quantize from now on, with the calibrated range if the grid is static.

        Raises:
            ValueError: a static grid without a range.
        """
        if self.spec.observer is not None and found is None:
            raise ValueError(f"{self.spec.describe()} needs a calibrated range")
        self.found, self._on, self._kept = found, True, None

    def switch_off(self) -> None:
        """Pass inputs through again."""
        self.found, self._on, self._kept = None, False, None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments with the first one, the input, rounded; None to leave them. An input without tokens, which an
        expert may get, has nothing to round."""
        inputs: Tensor = args[0]
        if not self._on or not inputs.numel():
            return None
        kept = self._kept
        if kept is None or not kept.is_of(inputs):
            rounded = fake_quantize_inputs(inputs.detach(), self.spec, self.found)
            if torch.is_grad_enabled() and inputs.requires_grad:
                rounded = straight_through(inputs, rounded)
            kept = _Rounded(inputs, inputs._version, rounded, self._readers)
        kept.left -= 1
        self._kept = kept if kept.left > 0 else None
        return (kept.rounded, *args[1:])


@dataclass
class _Rounded:
    """A rounded input and how many Linears are still to read it."""

    inputs: Tensor
    version: int
    rounded: Tensor
    left: int

    def is_of(self, inputs: Tensor) -> bool:
        """Whether it's the same tensor, not written to since."""
        return self.inputs is inputs and self.version == inputs._version
