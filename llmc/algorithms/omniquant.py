"""OmniQuant (Shao et al., 2023): learn by how much ranges shrink, and how outliers move, from a block's own output.

The weights themselves stay. Learnable weight clipping (LWC) shrinks both ends of each range by a sigmoid; learnable
equivalent transformations (LET) start from SmoothQuant's scales and OS+'s shifts. Both are learned together against
the output of the original block, on the inputs that the compressed model feeds (equation 1 of the paper).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from ..errors import ConfigError
from ..quant import MinMax, Scheme
from .base import Algorithm, Needs, Options
from .fit import Group, fit
from .learned import SMALLEST_SCALE, Clip, Site, compressed_weights, find_site, start_clip
from .rtn import round_subset
from .views import BlockView, SubsetView, TuneNote


def _by_composition(asked: bool) -> bool:
    if asked:
        raise ValueError("clips and scales aren't read from files: write method: [Awq, OmniQuant], one run does both")
    return asked


Composed = Annotated[bool, AfterValidator(_by_composition)]


class OmniQuantOptions(Options):
    """Options of OmniQuant, by LLMC's names."""

    lwc: bool = Field(default=True, description="Learn the clipping of the weights' ranges.")
    let: bool = Field(default=False, description="Learn scales (and shifts) that move outliers into the weights.")
    lwc_lr: float = Field(default=1e-2, gt=0, description="Learning rate of the clipping.")
    let_lr: float = Field(default=5e-3, gt=0, description="Learning rate of scales and shifts; 0.001 for 4-bit inputs.")
    epochs: int = Field(default=20, ge=1, description="Passes over the calibration batches for each block.")
    wd: float = Field(default=0.0, ge=0, description="Weight decay.")
    alpha: float = Field(default=0.5, ge=0, le=1, description="SmoothQuant's alpha, from which the scales start.")
    use_shift: bool | None = Field(
        default=None,
        description="Also shift channels, where biases can absorb it; by default where inputs are rounded.",
    )
    aug_loss: bool = Field(
        default=False, description="Add the distance to the original block's output on the compressed model's inputs."
    )
    smooth_up_down: bool = Field(default=False, description="Also scale the input of the feed-forward's last Linear.")
    search_clip_init: Composed = Field(default=False, description="Refused if True: write method [Awq, OmniQuant].")
    load_clip: Composed = Field(default=False, description="Refused if True: write method [Awq, OmniQuant].")
    search_scale_init: Composed = Field(default=False, description="Refused if True: write method [Awq, OmniQuant].")
    deactive_amp: Any = Field(default=None, description="Accepted for compatibility; model.torch_dtype decides.")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.lwc and not self.let:
            raise ValueError("lwc and let are both False, so that there is nothing to learn: set one to True")
        return self


class OmniQuant(Algorithm):
    """Learned clipping and smoothing, then rounding to nearest."""

    name = "OmniQuant"
    kind = "quantizer"
    options_type: ClassVar[type[Options]] = OmniQuantOptions
    learns = True

    def __init__(self, options: OmniQuantOptions) -> None:
        self.options = options
        if options.let:
            self.statistics = frozenset({"channel_range"})  # where scales and shifts start

    def needs(self, *, quant_out: bool | None) -> Needs:
        """As published, the compressed blocks' outputs go in, and the original's outputs are to come out."""
        return Needs(data=True, compressed_stream=True if quant_out is None else quant_out, targets=True)

    def check(self, key: str, scheme: Scheme) -> None:
        """Integer weights with ranges from their extremes, and dynamic inputs."""
        spec, act = scheme.weight, scheme.act
        if spec is not None and spec.grid != "int":
            raise ConfigError(
                f"{key}.weight.bit: OmniQuant learns the ranges of integer grids, not of {spec.describe()}",
                f"set {key}.weight.bit to 2 ... 8, or quant.method to GPTQ or Awq",
            )
        if spec is not None and not isinstance(spec.ranges, MinMax):
            raise ConfigError(
                f"{key}.weight.calib_algo: OmniQuant learns the ranges itself, there is nothing to search",
                f"set {key}.weight.calib_algo to learnable, or leave it out",
            )
        if act is not None and act.observer is not None:
            raise ConfigError(
                f"{key}.act.static: OmniQuant changes the inputs while it learns, their ranges aren't known before",
                f"set {key}.act.static to False, or quant.method to OsPlus or SmoothQuant",
            )

    def tune(self, view: BlockView) -> TuneNote:
        """Learn, and leave clips, scales and shifts in the subsets' views."""
        options, calls = self.options, view.calls
        sites, clips = self._sites(view), self._clips(view)
        weights = {name: weight.detach().float() for name, weight in view.weights.items()}
        dtype = next(iter(view.weights.values())).dtype
        with torch.no_grad():
            plain = [calls.plain(batch).cpu() for batch in range(len(calls))] if options.aug_loss else []

        def loss(batch: int) -> Tensor:
            output = calls.output(batch, compressed_weights(weights, sites, clips, dtype)).float()
            targets = [calls.target(batch), *plain[batch : batch + 1]]
            return torch.stack([nn.functional.mse_loss(output, one.to(output.device).float()) for one in targets]).sum()

        groups = self._groups(sites, clips)
        note = fit(groups, loss, len(calls), epochs=options.epochs, weight_decay=options.wd)
        with torch.no_grad():
            for site in sites:
                site.fold()
            for subset in view.subsets:
                subset.clips.update({name: clips[name].ratios() for name in subset.specs})
        return note

    def _sites(self, view: BlockView) -> list[Site]:
        """Where equivalent transformations are learned. What an earlier step has scaled starts as it left it."""
        if not self.options.let:
            return []
        found = [
            find_site(
                subset,
                alpha=None if view.transformed else self.options.alpha,
                shift=subset.act is not None if self.options.use_shift is None else self.options.use_shift,
                feed_forward=self.options.smooth_up_down,
            )
            for subset in view.subsets
        ]
        return [site for site in found if site is not None]

    def _clips(self, view: BlockView) -> dict[str, Clip]:
        """One for each Linear to be rounded."""
        return {
            name: start_clip(subset.linears[name].weight, spec, subset.clips.get(name), learn=self.options.lwc)
            for subset in view.subsets
            for name, spec in subset.specs.items()
        }

    def _groups(self, sites: list[Site], clips: dict[str, Clip]) -> list[Group]:
        """The parameters with their learning rates."""
        scales = [site.scale for site in sites]
        shifts = [site.shift for site in sites if site.shift is not None]
        ends = [end for clip in clips.values() for end in (clip.lo, clip.hi)] if self.options.lwc else []
        for parameter in [*scales, *shifts, *ends]:
            parameter.requires_grad_()
        return [
            Group(scales, self.options.let_lr, lowest=SMALLEST_SCALE),
            Group(shifts, self.options.let_lr),
            Group(ends, self.options.lwc_lr),
        ]

    def subset(self, view: SubsetView) -> None:
        """Round to nearest within the learned clips."""
        round_subset(view)
