"""AWQ (Lin et al., 2023): scale up the input channels that matter before rounding, then clip.

The scale of a channel is ``mean|x|^alpha``; the previous operation absorbs it. ``alpha`` is searched by the error of
the module that sees the effect, over all calibration tokens, with the identity as a candidate. Then the range of each
row and group is shrunk to where its output error is least.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..models import ScaleRule
from ..quant import (
    PerBlock,
    PerGroup,
    PerTensor,
    QuantSpec,
    bind_global_scale,
    from_groups,
    to_groups,
)
from ..quant.affine import fake_quantize, find_ranges, qparams
from .base import Algorithm, Layers, Needs, Options
from .search import best_scale
from .views import ClipRatios, SubsetView

_RATIOS = 20  # alpha = 0, 1/20, ... 19/20
_SHRINKS = 10  # the range shrinks by 0, 5, ... 45%
# Queries and keys multiply: their error isn't theirs. The last two are fused.
_UNCLIPPED = ("q_proj", "k_proj", "query", "key", "qkv", "c_attn")


class AwqOptions(Options):
    """Options of AWQ, by LLMC's names."""

    layers: Layers = None
    trans: bool = Field(default=True, description="Search and fold the channel scales.")
    trans_version: Literal["v1", "v2"] = Field(
        default="v2", description="v2: scales from activations alone; v1: divided by the weights' own relative size."
    )
    weight_clip: bool = Field(default=True, description="Search the clipping ranges after scaling.")
    clip_version: Literal["v1"] = Field(default="v1", description="Clipped ranges are used as found.")
    clip_sym: bool | None = Field(
        default=None, description="Shrink both ends of a range alike; by default only where the grid is symmetric."
    )
    do_gqa_trans: bool = Field(
        default=False, description="Also scale the output projection where several query heads share a value head."
    )
    search: Literal["race", "full"] = Field(
        default="race",
        description="race: candidates that are clearly behind after a part of the calibration tokens drop out; "
        "full: every candidate is measured on every token.",
    )
    save_mem: Any = Field(default=None, description="Accepted for compatibility; without effect.")
    awq_bs: Any = Field(default=None, description="Accepted for compatibility; without effect.")


class Awq(Algorithm):
    """Activation-aware scaling and clipping. A transform: rounding is left to the step that follows."""

    name = "Awq"
    kind = "transform"
    options_type: ClassVar[type[Options]] = AwqOptions
    statistics = frozenset({"gram", "abs_mean"})

    def __init__(self, options: AwqOptions) -> None:
        self.options = options
        self.layers = options.layers
        self.folds = options.trans

    def needs(self, *, quant_out: bool | None) -> Needs:
        """The original model's activations calibrate it, unless ``quant_out`` asks otherwise."""
        return Needs(data=True, compressed_stream=bool(quant_out))

    def subset(self, view: SubsetView) -> None:
        """Choose the subset's scale, then the clip of each Linear as it will be after scaling."""
        gram, abs_mean = view.stats.gram, view.stats.abs_mean
        if gram is None or abs_mean is None:
            raise ValueError("AWQ needs the Gram matrix and the mean magnitude of its inputs")
        if not view.specs or gram.tokens == 0:
            return
        scale = torch.ones(view.columns, device=gram.matrix.device)
        rule = view.scale_rule(allow_gqa=self.options.do_gqa_trans) if self.options.trans else None
        if rule is not None:
            scales = candidates(view, abs_mean.mean, rule, self.options)
            scale = scales[best_scale(view, scales, full=self.options.search == "full")]
            if not torch.equal(scale, torch.ones_like(scale)):
                view.fold_scale(scale, rule)
        if self.options.weight_clip:
            scaled = gram.matrix / scale / scale[:, None]
            for name, spec in view.specs.items():
                if not any(part in name for part in _UNCLIPPED):
                    weight = view.weight(name) * scale
                    symmetric = spec.symmetric if self.options.clip_sym is None else self.options.clip_sym
                    view.clips[name] = search_clip(weight, scaled, spec, symmetric=symmetric)


def candidates(view: SubsetView, magnitude: Tensor, rule: ScaleRule, options: AwqOptions) -> list[Tensor]:
    """Scales ``[in]`` to choose from, normalized around 1; the first is the identity."""
    grown = magnitude.clamp(min=1e-4)
    shrunk = torch.ones_like(grown)
    if options.trans_version == "v1":
        shrunk = _relative_weight(view).clamp(min=1e-4)
    found = [torch.ones_like(grown)]
    for step in range(_RATIOS):
        alpha = step / _RATIOS
        raw = grown**alpha / (shrunk ** (1 - alpha) if options.trans_version == "v1" else shrunk)
        scale = rule.tie(raw / (raw.max() * raw.min()).sqrt())
        found.append(torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale)))
    return found[:1] + found[2:] if options.trans_version == "v2" else found  # alpha = 0 is the identity itself


def _relative_weight(view: SubsetView) -> Tensor:
    """Mean over the rows of all Linears of ``|w| / max|w| of its group``, ``[in]``."""
    relative = []
    for name in view.linears:
        weight, spec = view.weight(name), view.specs.get(name)
        groups = weight.abs()
        if spec is not None:
            groups = to_groups(groups, spec)
        groups = groups / groups.amax(-1, keepdim=True).clamp(min=1e-6)
        relative.append(groups if spec is None else from_groups(groups, weight.shape, spec))
    return torch.cat(relative).mean(0)


def search_clip(weight: Tensor, gram: Tensor, spec: QuantSpec, *, symmetric: bool) -> ClipRatios:
    """Shrink the range of each row and group to where its own output error is least.

    The error of a group is ``d H dᵀ`` with ``d`` its change of weight and ``H`` the group's diagonal block of the Gram
    matrix: exact over all tokens. An asymmetric range shrinks first at the upper, then at the lower end.

    Args:
        weight: ``[out, in]`` float32.
        gram: ``[in, in]`` of the inputs.
        spec: the grid.
        symmetric: shrink both ends alike.
    """
    spec = bind_global_scale(spec, [weight])
    groups = to_groups(weight, spec)
    lo, hi = find_ranges(groups, spec)
    blocks = _diagonal_blocks(gram, groups.shape[-1]) if isinstance(spec.granularity, PerGroup) else gram[None]
    best_lo, best_hi = torch.ones_like(lo), torch.ones_like(hi)
    if isinstance(spec.granularity, PerTensor | PerBlock):
        return ClipRatios(best_lo.squeeze(-1), best_hi.squeeze(-1))  # one range for all rows: nothing to trade
    ends = ("both",) if symmetric else ("hi", "lo")
    for end in ends:
        best = torch.full_like(lo, torch.inf)
        start_lo, start_hi = best_lo.clone(), best_hi.clone()
        for step in range(_SHRINKS):
            ratio = 1 - step / (2 * _SHRINKS)
            try_lo = start_lo * ratio if end != "hi" else start_lo
            try_hi = start_hi * ratio if end != "lo" else start_hi
            delta = fake_quantize(groups, *qparams(lo * try_lo, hi * try_hi, spec), spec).sub_(groups)
            error = torch.einsum("ogi,gij,ogj->og", delta, blocks, delta)[..., None]
            better = error < best
            best = torch.where(better, error, best)
            best_lo, best_hi = torch.where(better, try_lo, best_lo), torch.where(better, try_hi, best_hi)
    return ClipRatios(best_lo.squeeze(-1), best_hi.squeeze(-1))


def _diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    count = len(gram) // size
    return gram.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
