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
    return {
        "error": note.error if own or measured is None else measured,
        "error_of": "calibration" if own else "weights" if measured is None else "sample",
        "cosine": plain(outputs.cosine),
        "sqnr_db": plain(decibels(outputs.error)),
        "sample_tokens": sum(len(piece) for piece in read.exact),
        "bits": None if quantized is None else _bits(quantized),
        "weight": _numbers_of_pruned(weight, view.weights[name])
        if quantized is None
        else _numbers_of_codes(weight, quantized),
    }


def _bits(quantized: QWeight) -> float:
    weights = quantized.codes.numel()
    return quantized.spec.stored_bits(weights, quantized.scale.numel()) / weights


def _numbers_of_pruned(weight: Tensor, pruned: Tensor) -> dict[str, Any]:
    zeros = 1 - int(pruned.count_nonzero()) / pruned.numel()
    return _weight_numbers(weight, squared_norm(pruned, weight), None, zeros)


def _numbers_of_codes(weight: Tensor, quantized: QWeight) -> dict[str, Any]:
    noise = sum(squared_norm(part.to(weight.dtype), weight[rows]) for rows, part in quantized.dense_strips())
    return _weight_numbers(weight, noise, clipped_share(weight, quantized), zero_share(quantized))


def _weight_numbers(weight: Tensor, noise: float, clipped: float | None, zeros: float) -> dict[str, Any]:
    rows = row_moments(weight)
    whole = rows.merged(0)
    size = float(whole.energy)
    return {
        "kurtosis": {"tensor": plain(float(whole.kurtosis)), "channel": Spread.of(rows.kurtosis).to_dict()},
        "sqnr_db": plain(decibels(noise / size if size else float("nan"))),
        "clipped": None if clipped is None else plain(clipped),
        "zeros": plain(zeros),
    }
