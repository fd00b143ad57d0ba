"""What every candidate scheme would do to each Linear: a quantizer tries them all and delivers none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from ..quant import QuantSpec, bind_global_scale
from .base import Algorithm, Needs, Options
from .stats import relative_error
from .views import LayerNote, SubsetView


class MeasuringOptions(Options):
    """None: it isn't named in a file."""


class Measuring(Algorithm):
    """Lets a quantizer round each Linear with each candidate, and notes the relative errors of its output.

    The weights stay as they are: every Linear is measured with all others exact.

    Args:
        quantizer: the one of the recipe. One that learns rounds here with what earlier steps have left.
        candidates: the grids.
    """

    name = "sensitivity"
    kind = "quantizer"
    options_type: ClassVar[type[Options]] = MeasuringOptions
    delivers = False

    def __init__(self, quantizer: Algorithm, candidates: Sequence[QuantSpec]) -> None:
        self._quantizer, self._candidates = quantizer, candidates
        self.statistics = quantizer.statistics | {"gram"}

    def needs(self, *, quant_out: bool | None) -> Needs:
        """The activations of the model in front of it; they go on unchanged, so that one forward does."""
        return Needs(data=True)

    def subset(self, view: SubsetView) -> None:
        """Measure one subset."""
        self.solve([view])

    def solve(self, views: Sequence[SubsetView]) -> None:
        """Measure subsets, those that the quantizer solves together, together."""
        found: dict[tuple[int, str], list[float]] = {}
        for spec in self._candidates:
            trials = [_trial(view, spec) for view in views]
            self._quantizer.solve(trials)
            for index, trial in enumerate(trials):
                for name in trial.specs:
                    found.setdefault((index, name), []).append(_error(trial, name))
        for (index, name), errors in found.items():
            views[index].notes[name] = LayerNote(trials=tuple(errors))


def _trial(view: SubsetView, spec: QuantSpec) -> SubsetView:
    """The same subset with another grid, and nothing delivered yet. Clips are left out: they were found for the grid of
    the recipe, and would favour it."""
    weights = {name: view.linears[name].weight.detach() for name in view.specs}
    specs = {
        name: bind_global_scale(spec, [weights[other] for other in view.subset.fused_with(name) if other in weights])
        for name in weights
    }
    return replace(view, specs=specs, clips={}, quantized={}, notes={})


def _error(trial: SubsetView, name: str) -> float:
    """``|(W - W')X|² / |WX|²``; of the weights alone where no token came."""
    gram = trial.stats.gram
    inputs = None if gram is None or gram.tokens == 0 else gram.matrix
    return relative_error(trial.linears[name].weight.detach(), trial.quantized[name].dequantize(), inputs)
