"""Channels that stand out of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .plain import plain

OUTLIER_RATIO = 6.0
"""A channel is an *outlier channel* if its largest magnitude is more than 6 times the median of all channels' largest.

The number is that of LLM.int8() (Dettmers et al., 2022, section 4: features with a magnitude of 6 or more), where the
rest of the features are of magnitude 1 or so. Here it's relative to the median, since tensors differ in scale."""

WORST = 8


@dataclass(frozen=True)
class Outliers:
    """The channels that stand out.

    Attributes:
        count: of outlier channels.
        share: of the tensor's energy ``Σ x²`` that is in them; NaN if there is none at all.
        worst: number and ratio of the largest channels, outliers or not, largest first.
    """

    count: int
    share: float
    worst: tuple[tuple[int, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``metrics.json``."""
        worst = [{"channel": channel, "ratio": plain(ratio)} for channel, ratio in self.worst]
        return {"count": self.count, "share": plain(self.share), "worst": worst}


def outlier_channels(largest: Tensor, energy: Tensor) -> Outliers:
    """Find them.

    Args:
        largest: each channel's largest magnitude, ``[channels]``. Channels that are always 0 don't count for the
            median (the mean of both middle ones): among dead channels every other would stand out.
        energy: each channel's ``Σ x²``, ``[channels]``.
    """
    magnitudes = largest.double()
    alive = magnitudes[magnitudes > 0]
    if not alive.numel():
        return Outliers(0, float("nan"), ())
    ratios = magnitudes / alive.quantile(0.5)
    order = ratios.argsort(descending=True, stable=True)[:WORST].tolist()
    found = ratios > OUTLIER_RATIO
    share = float(energy.double()[found].sum() / energy.double().sum())
    return Outliers(int(found.sum()), share, tuple((index, float(ratios[index])) for index in order))
