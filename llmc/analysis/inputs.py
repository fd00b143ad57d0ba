"""What Linears read: how heavy the tails are, and which channels stand out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .channels import outlier_channels
from .moments import Moments, rows_at_once
from .plain import plain


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of the population: divided by their number) of some numbers; NaN of none."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """Of those that are numbers."""
        known = values[values.isfinite()].double()
        if not known.numel():
            return cls(float("nan"), float("nan"))
        return cls(float(known.mean()), float(known.std(correction=0)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``metrics.json``."""
        return {"mean": plain(self.mean), "std": plain(self.std)}


class InputProfile:
    """Goes over the tokens ``[tokens, channels]`` of one tensor, a piece after the other. Sums are float64."""

    def __init__(self) -> None:
        self._channels: list[Moments] = []
        self._tokens: list[Tensor] = []
        self._largest: Tensor | None = None

    def update(self, tokens: Tensor) -> None:
        """Add tokens ``[tokens, channels]`` of any float dtype."""
        for part in torch.split(tokens, rows_at_once(tokens.shape[1])) if tokens.numel() else ():
            self._channels.append(Moments.of(part, 0))
            self._tokens.append(Moments.of(part, 1).kurtosis)
            largest = part.abs().amax(0)
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def to_dict(self) -> dict[str, Any] | None:
        """Plain values, for ``metrics.json``; None if there was no token."""
        if self._largest is None:
            return None
        channels = Moments.stacked(self._channels).merged(0)
        return {
            "kurtosis": {
                "tensor": plain(float(channels.merged(0).kurtosis)),
                "channel": Spread.of(channels.kurtosis).to_dict(),
                "token": Spread.of(torch.cat(self._tokens)).to_dict(),
            },
            "outliers": outlier_channels(self._largest, channels.energy).to_dict(),
        }
