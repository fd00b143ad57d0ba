"""How far the outputs of a changed Linear are from what they should be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROWS = 512  # of outputs at once


def decibels(error: float) -> float:
    """The ratio of signal to noise of a relative error, ``-10 log10(error)``; infinite where there is none."""
    return -10 * math.log10(error) if error > 0 else math.inf if error == 0 else math.nan


class OutputComparison:
    """Compares ``y = X Wᵀ`` with ``y' = X' W'ᵀ``, biases left out. Products are float32, their sums float64."""

    def __init__(self) -> None:
        self._exact = self._changed = self._noise = self._both = 0.0

    def update(self, exact: Tensor, changed: Tensor) -> None:
        """Add outputs of the same shape, of any float dtype."""
        y, y_q = exact.double(), changed.double()
        sums = torch.stack([(y * y).sum(), (y_q * y_q).sum(), (y_q - y).square().sum(), (y * y_q).sum()]).tolist()
        self._exact += sums[0]
        self._changed += sums[1]
        self._noise += sums[2]
        self._both += sums[3]

    def products(self, inputs: Tensor, weight: Tensor, rounded: Tensor, changed: Tensor) -> None:
        """Add the outputs of inputs ``[tokens, in]`` and a weight ``[out, in]``, and of what became of either."""
        exact_t, changed_t = weight.float().T, changed.float().T
        for x, x_q in zip(torch.split(inputs, _ROWS), torch.split(rounded, _ROWS), strict=True):
            self.update(x.float() @ exact_t, x_q.float() @ changed_t)

    @property
    def error(self) -> float:
        """``|y' - y|² / |y|²``; NaN if nothing was compared, or with zeros."""
        return self._noise / self._exact if self._exact else math.nan

    @property
    def cosine(self) -> float:
        """``y·y' / (|y| |y'|)`` over all tokens and channels at once; NaN if either is 0."""
        size = math.sqrt(self._exact * self._changed)
        return self._both / size if size else math.nan
