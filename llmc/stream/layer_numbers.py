"""What is told of one compressed Linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..algorithms import SubsetView
from ..analysis import OutputComparison, Spread, decibels, plain, row_moments
from ..quant import QWeight, clipped_share, squared_norm, zero_share


@dataclass(frozen=True)
class ReadInputs:
    """What a Linear reads of the sample, ``[tokens, in]`` in pieces: as it comes, and rounded."""

    exact: Sequence[Tensor]
    rounded: Sequence[Tensor]


def layer_numbers(name: str, view: SubsetView, read: ReadInputs) -> dict[str, Any]:
    """Numbers of a Linear of a view that holds results, while its module still holds the exact weight.

    The relative error ``|W'X' - WX|²/|WX|²`` is that of the calibration tokens where the step had their Gram matrix,
    else that of the sample, else, without one, of the weights alone.
    """
    weight, quantized = view.linears[name].weight.detach(), view.quantized.get(name)
    outputs, note = OutputComparison(), view.notes[name]
    if read.exact:
        changed = view.weights[name].to(weight.dtype) if quantized is None else quantized.dequantize(weight.dtype)
        for exact, rounded in zip(read.exact, read.rounded, strict=True):
            outputs.products(exact, weight, rounded, changed)
    own = view.stats.gram is not None and note.fallback is None
    measured = plain(outputs.error)
    of = "calibration" if own else "weights" if measured is None else "sample"
    known = note.error if of == "weights" and quantized is not None else None
    return {
        "error": note.error if own or measured is None else measured,
        "error_of": of,
        "cosine": plain(outputs.cosine),
        "sqnr_db": plain(decibels(outputs.error)),
        "sample_tokens": sum(len(piece) for piece in read.exact),
        "bits": None if quantized is None else _bits(quantized),
        "weight": _weight_numbers(weight, view.weights[name] if quantized is None else quantized, known),
    }


def _bits(quantized: QWeight) -> float:
    weights = quantized.codes.numel()
    return quantized.spec.stored_bits(weights, quantized.scale.numel()) / weights


def _weight_numbers(weight: Tensor, changed: Tensor | QWeight, error: float | None) -> dict[str, Any]:
    """Of a weight and what became of it; ``error`` is its relative error, if that is known."""
    rows = row_moments(weight)
    whole = rows.merged(0)
    size = float(whole.energy)
    if error is None:
        error = _noise(weight, changed) / size if size else float("nan")
    if isinstance(changed, QWeight):
        clipped, zeros = plain(clipped_share(weight, changed)), zero_share(changed)
    else:
        clipped, zeros = None, 1 - int(changed.count_nonzero()) / changed.numel()
    return {
        "kurtosis": {"tensor": plain(float(whole.kurtosis)), "channel": Spread.of(rows.kurtosis).to_dict()},
        "sqnr_db": plain(decibels(error)),
        "clipped": clipped,
        "zeros": plain(zeros),
    }


def _noise(weight: Tensor, changed: Tensor | QWeight) -> float:
    if isinstance(changed, Tensor):
        return squared_norm(changed, weight)
    return sum(squared_norm(part.to(weight.dtype), weight[rows]) for rows, part in changed.dense_strips())
