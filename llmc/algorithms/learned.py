"""Clips and scales of a block that gradients reach: learnable weight clipping and learnable equivalent transformations.

Both are OmniQuant's (Shao et al., 2023, section 3.2 and 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import ScaleRule, smoothed
from ..quant import QuantSpec, clipped_weight
from .smoothquant import smoothing
from .views import ClipRatios, SubsetView

SMALLEST_SCALE = 1e-2
"""Scales of channels aren't smaller, as in the authors' code."""

_START = 4.0  # sigmoid(4) = 0.982
_LARGEST_RATIO = 0.9999  # beyond, a sigmoid has no gradient left


@dataclass(frozen=True)
class Clip:
    """Logits ``[out, groups]`` of the ratios by which the two ends of a Linear's ranges shrink, float32."""

    spec: QuantSpec
    lo: Tensor
    hi: Tensor

    def ratios(self) -> ClipRatios:
        """What the logits stand for; an infinite one for no clipping at all."""
        return ClipRatios(self.lo.sigmoid(), self.hi.sigmoid())


def start_clip(weight: Tensor, spec: QuantSpec, earlier: ClipRatios | None, *, learn: bool) -> Clip:
    """Where clipping starts: at what an earlier step found, else at sigmoid(4).

    Args:
        weight: ``[out, in]``.
        spec: its grid.
        earlier: a found clip.
        learn: whether it will be learned. If not, it stays exactly where it is, and without an earlier one there is no
            clipping.
    """
    if earlier is None:
        start = torch.full(spec.scale_shape(*weight.shape), _START if learn else torch.inf, device=weight.device)
        return Clip(spec, start, start.clone())
    lo, hi = (end.float().clamp(max=_LARGEST_RATIO) if learn else end.float() for end in (earlier.lo, earlier.hi))
    return Clip(spec, torch.logit(lo), torch.logit(hi))


@dataclass(frozen=True)
class Site:
    """A shared input that is divided by a scale and shifted.

    Attributes:
        view: its subset.
        rule: how its channels map onto those of ``prev``.
        scale: ``[prev's outputs]``, float32, positive.
        shift: ``[in]``, or None where biases can't absorb one or nobody wants it.
    """

    view: SubsetView
    rule: ScaleRule
    scale: Tensor
    shift: Tensor | None

    def fold(self) -> None:
        """Ask for what was learned to be folded."""
        if self.shift is not None:
            self.view.fold_shift(self.shift.detach())
        self.view.fold_scale(self.rule.to_inputs(self.scale.detach()), self.rule)


def find_site(view: SubsetView, *, alpha: float | None, shift: bool, feed_forward: bool) -> Site | None:
    """Where a subset's scale and shift start; None if the input can't be transformed, or isn't to be.

    Inputs that a norm or the value projection makes are transformed; those of the last Linear of the feed-forward only
    if asked for. The shift starts at the middle of each channel's range.

    Args:
        view: a subset with the range of each channel of its input.
        alpha: SmoothQuant's, which gives the scale; None: 1.
        shift: also shift, where biases can absorb it.
        feed_forward: whether to transform that last Linear too.
    """
    found, rule = view.stats.channel_range, view.scale_rule(allow_gqa=True)
    if found is None or rule is None or not view.specs or (view.subset.reads == "ffn" and not feed_forward):
        return None
    if found.tokens == 0:
        return None
    # A shift doesn't pass the activation function that stands in front of the feed-forward's last Linear.
    shift = shift and view.can_shift and rule.repeat == 1 and view.subset.reads != "ffn"
    middle = (found.lo + found.hi) / 2 if shift else None
    scale = torch.ones_like(found.hi)
    if alpha is not None:
        offset = 0 if middle is None else middle
        reach = torch.maximum(found.hi - offset, offset - found.lo)
        largest = torch.stack([view.weight(name).abs().amax(0) for name in view.linears])
        scale = smoothing(reach, largest.amax(0), alpha)
    return Site(view, rule, rule.to_prev(rule.tie(scale)).clamp(min=SMALLEST_SCALE), middle)


def compressed_weights(
    weights: Mapping[str, Tensor], sites: Sequence[Site], clips: Mapping[str, Clip], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a block's weights become by sites and clips, rounded to their grids. Gradients reach both.

    Args:
        weights: all of the block, by name, float32.
        sites: in execution order.
        clips: of the Linears to be rounded, by name.
        dtype: of the result, which has all of ``weights``.
    """
    changed = dict(weights)
    for site in sites:
        subset = site.view.subset
        readers = (*subset.linears, *subset.also)
        changed |= smoothed(changed, str(subset.prev), readers, site.scale, site.rule, site.shift)
    for name, clip in clips.items():
        ratios = clip.ratios()
        changed[f"{name}.weight"] = clipped_weight(changed[f"{name}.weight"], clip.spec, ratios.lo, ratios.hi, dtype)
    return {name: weight.to(dtype) for name, weight in changed.items()}
