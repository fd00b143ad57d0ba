"""The search that AWQ, SmoothQuant and OS+ share: which scale of a subset's input does the inspected module least harm.

A candidate divides the shared input by ``scale`` and multiplies the Linears' input channels by it; then both are
rounded to their grids, the input only where activations are quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..quant import ActSpec, InputRange, QuantSpec, bind_global_scale, fake_quantize_inputs, fake_quantize_weight
from .views import SubsetView

_ENOUGH = 512  # tokens that tell which candidates are hopeless
_STRIDE = 10  # between two candidates of a coarse search


def best_scale(view: SubsetView, scales: Sequence[Tensor], *, full: bool, shift: Tensor | None = None) -> int:
    """Index of the candidate with the least squared error at the inspected module, over all calibration tokens.

    Args:
        view: the subset, with the inspected module's calls or, where a Linear is its own witness, the Gram matrix.
        scales: ``[in]`` each; the first is the identity.
        full: measure every candidate on every token, rather than letting those fall out that are clearly behind.
        shift: ``[in]``, subtracted from the input before it's divided; the Linears' biases make up for it.
    """
    inspected, gram = view.subset.inspect, view.stats.gram
    if len(view.linears) == 1 and inspected in view.linears and view.act is None and gram is not None:
        # The error over all tokens is a quadratic form of the Gram matrix.
        losses = [_linear_loss(view, scale, gram.matrix) for scale in scales]
        return losses.index(min(losses))
    return _race(view, scales, shift, full=full)


def best_in_order(view: SubsetView, scales: Sequence[Tensor], *, shift: Tensor | None = None) -> int:
    """The same where neighbours are alike: of every tenth candidate the best, then of all up to the next ones.

    Args:
        view: as above.
        scales: ``[in]`` each; the first is the identity, which stays a candidate to the end.
        shift: as above.
    """
    coarse: list[int] = sorted({0, *range(_STRIDE, len(scales), _STRIDE), len(scales) - 1})
    at = coarse[best_scale(view, [scales[index] for index in coarse], full=False, shift=shift)]
    near: list[int] = sorted({0, *range(max(at - _STRIDE, 0) + 1, min(at + _STRIDE, len(scales)))})
    return near[best_scale(view, [scales[index] for index in near], full=False, shift=shift)]


def _linear_loss(view: SubsetView, scale: Tensor, gram: Tensor) -> float:
    total = 0.0
    for name, spec in view.specs.items():
        weight = view.weight(name)
        delta = _rounded(weight * scale, spec).div_(scale).sub_(weight)
        total += float(((delta @ gram) * delta).sum())
    return total


def _rounded(weight: Tensor, spec: QuantSpec) -> Tensor:
    return fake_quantize_weight(weight, bind_global_scale(spec, [weight]))


def _race(view: SubsetView, scales: Sequence[Tensor], shift: Tensor | None, *, full: bool) -> int:
    """Index of the best candidate by the squared error of the inspected module, summed over the batches.

    Candidates meet the batches in rounds that double in length; after each the best third of those still in the race
    stays. The errors of two candidates on the same tokens go together so closely that a sixteenth of the tokens tells
    which are hopeless. The identity stays to the end: the winner is compared with it on all tokens.
    """
    calls = view.calls
    if calls is None:
        raise ValueError("the search needs the inspected module's calls")
    losses = [0.0] * len(scales)
    running = list(range(len(scales)))
    seen, first = 0, _first_round(view, len(calls))
    while seen < len(calls):
        stop = len(calls) if full else min(len(calls), max(2 * seen, first))
        reference = {batch: calls.output(batch).float() for batch in range(seen, stop)}
        # In the last round only the best matters: who is worse than a finished one needn't run to the end.
        bound = math.inf
        for index in running:
            with _trial(view, scales[index], shift):
                for batch, expected in reference.items():
                    if losses[index] > bound:
                        break
                    losses[index] += float((calls.output(batch).float() - expected).square().sum())
            if stop == len(calls):
                bound = min(bound, losses[index])
        seen = stop
        running.sort(key=losses.__getitem__)
        staying = running[: max(1, len(running) // 3)]
        running = staying if 0 in staying else [*staying, 0]
    return running[0]


def _first_round(view: SubsetView, batches: int) -> int:
    """Batches of the first round: a sixteenth, but enough of them for ``_ENOUGH`` tokens."""
    return max(math.ceil(batches / 16), math.ceil(_ENOUGH * batches / max(view.stats.tokens, 1)))


@contextmanager
def _trial(view: SubsetView, scale: Tensor, shift: Tensor | None) -> Iterator[None]:
    """Within the context the Linears compute what they would after folding and rounding."""
    plain = view.act is None and shift is None

    def changed(name: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = view.weight(name), None if shift is None else view.bias(name)
        rounded = _rounded(weight * scale, view.specs[name])
        moved = None if shift is None or bias is None else bias + weight @ shift
        return (rounded.div_(scale) if plain else rounded), moved

    if plain:
        with view.trial(changed):
            yield
        return
    rounding, plain_input = _Input(view.act, scale, shift), _Input(None, scale, shift)
    hooks = {name: plain_input if name in view.unrounded else rounding for name in view.specs}
    with view.trial(changed):
        handles = [view.linears[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Input:
    """A forward pre-hook that shifts, scales and rounds an input; the Linears of a subset share the result."""

    def __init__(self, act: ActSpec | None, scale: Tensor, shift: Tensor | None) -> None:
        self._act, self._scale, self._shift = act, scale, shift
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._last is None or self._last[0] is not args[0]:
            inputs = args[0].float() if self._shift is None else args[0].float() - self._shift
            self._last = args[0], self._rounded(inputs / self._scale).to(args[0].dtype)
        return (self._last[1], *args[1:])

    def _rounded(self, inputs: Tensor) -> Tensor:
        if self._act is None:
            return inputs
        # A static range is found when all transforms are done; here the batch's own stands for it.
        found = None if self._act.observer is None else InputRange(float(inputs.min()), float(inputs.max()))
        return fake_quantize_inputs(inputs, self._act, found)
