"""SmoothQuant (Xiao et al., 2023): move the size of outlier channels from the activations into the weights.

The scale of an input channel is ``max|x|^alpha / max|W|^(1 - alpha)`` (equation 4); the norm in front absorbs it. Only
subsets that read a norm are smoothed, as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from .base import Algorithm, Layers, Needs, Options, is_named
from .search import best_scale
from .views import SubsetView

_ALPHAS = tuple(step / 20 for step in range(2, 20))  # 0.1, 0.15, ... 0.95
_SMALLEST = 1e-5

Alpha = float | Literal["auto"]


class SmoothQuantOptions(Options):
    """Options of SmoothQuant, by LLMC's names."""

    layers: Layers = None
    alpha: Alpha | dict[str, Alpha] = Field(
        default=0.5,
        description="How much of the outliers goes into the weights, from 0 to 1; auto: the value with the least error "
        "of each subset's output, no smoothing included; or a value for each Linear that is first in its subset, as in "
        "{q_proj: 0.8, gate_proj: auto} (0.5 for the others).",
    )


class SmoothQuant(Algorithm):
    """Smoothing of activations. A transform: rounding is left to the step that follows."""

    name = "SmoothQuant"
    kind = "transform"
    options_type: ClassVar[type[Options]] = SmoothQuantOptions
    statistics = frozenset({"abs_max"})
    works_on = frozenset({"residual"})

    def __init__(self, options: SmoothQuantOptions) -> None:
        self.options = options
        self.layers = options.layers

    def needs(self, *, quant_out: bool | None) -> Needs:
        """The original model's activations calibrate it, unless ``quant_out`` asks otherwise."""
        return Needs(data=True, compressed_stream=bool(quant_out))

    def subset(self, view: SubsetView) -> None:
        """Fold the scale into the norm that feeds the subset."""
        abs_max = view.stats.abs_max
        if abs_max is None:
            raise ValueError("SmoothQuant needs the largest magnitude of its inputs")
        rule = view.scale_rule(allow_gqa=False)
        if rule is None or not view.fed_by_norm or abs_max.tokens == 0:
            return
        alpha = alpha_of(self.options.alpha, view.subset.linears[0])
        weights = torch.stack([view.weight(name).abs().amax(0) for name in view.linears])
        if alpha == "auto":
            scales = [torch.ones_like(abs_max.max), *(smoothing(abs_max.max, weights.amax(0), a) for a in _ALPHAS)]
            scale = scales[best_scale(view, scales, full=False)] if view.specs else scales[0]
        else:
            scale = smoothing(abs_max.max, weights.amax(0), alpha)
        if not torch.equal(scale, torch.ones_like(scale)):
            view.fold_scale(scale, rule)


def alpha_of(alpha: Alpha | Mapping[str, Alpha], linear: str) -> Alpha:
    """The alpha of the subset whose first Linear is ``linear``."""
    if not isinstance(alpha, Mapping):
        return alpha
    return next((value for name, value in alpha.items() if is_named(linear, name)), 0.5)


def smoothing(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Scale ``[in]`` by the largest magnitudes ``[in]`` of activations and weights; 1 where either is always 0."""
    scale = (activations**alpha / weights.clamp(min=_SMALLEST) ** (1 - alpha)).clamp(min=_SMALLEST)
    return torch.where((activations > 0) & (weights > 0) & scale.isfinite(), scale, torch.ones_like(scale))
