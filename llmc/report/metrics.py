"""``metrics.json``: every number of a run with what is needed to compare it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..eval.measure import Evaluated
from .experts import BlockExperts

SCHEMA = 2
READABLE = (1, SCHEMA)  # of which 2 has more kinds of evaluations, and numbers of layers that may be missing
BLOCK_KEYS = (
    "unit",
    "seconds",
    "seconds_by_kind",
    "memory",
    "error",
    "layers",
    "activations",
    "scales",
    "inputs",
    "cache_ranges",
    "tuning",
)


@dataclass(frozen=True)
class Measured:
    """What the run cost.

    Attributes:
        seconds: wall time of this process's part of the run.
        by_kind: the same by kind of work.
        bytes_read: tensor data read from the checkpoint.
        peak_host: largest resident size, bytes.
        peak_device: largest allocation on the CUDA device, bytes; 0 without one.
    """

    seconds: float
    by_kind: Mapping[str, float]
    bytes_read: int
    peak_host: int
    peak_device: int


@dataclass(frozen=True)
class About:
    """What was run, in plain values.

    Attributes:
        config: the configuration, complete.
        versions: of the libraries that numbers depend on.
        model: where it is from, what it is, and what it's computed in.
        scheme: of the weights that have no scheme of their own.
        sparsity: the pattern and what was asked for.
        activations: the scheme of inputs.
        mixed: other schemes, each with its layers.
        kv_scheme: the scheme of the KV cache.
        calibration_tokens: how many.
    """

    config: Mapping[str, Any]
    versions: Mapping[str, str]
    model: Mapping[str, Any]
    scheme: Mapping[str, Any] | None
    sparsity: Mapping[str, Any] | None
    activations: Mapping[str, Any] | None
    mixed: Sequence[Mapping[str, Any]]
    kv_scheme: Mapping[str, Any] | None
    calibration_tokens: int


def make_metrics(
    about: About,
    measured: Measured,
    *,
    bits: float | None,
    budget: Mapping[str, Any] | None,
    influence: Mapping[str, Any] | None,
    encoder: Mapping[str, Any] | None,
    evaluations: Sequence[Evaluated],
    outputs: Mapping[str, Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    analysis: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Plain values. What ``analysis``, ``layers`` and ``activations`` say of each layer is in docs/analysis.md.
    ``layers`` gives each Linear's relative output error, the damping that GPTQ needed and why a layer fell back;
    of a pruned one the fraction of zeros and, if a quantizer followed, the error that it found (``error`` is then the
    quantizer's own); ``inputs`` the calibrated range of each subset's input where activations have
    static scales. ``blocks_dropped`` gives the influence of every block of the original model and the numbers of those
    that were left out; ``unit`` keeps the original numbers. ``bit_budget`` says what was asked of a budget of bits,
    what was chosen (``yaml`` reproduces it without measuring), and how many nats per token it was expected to lose.
    ``experts`` says of each block of a mixture how many calibration tokens its experts were shown, and which saw too
    few and were solved with those of all; in ``layers`` stand every expert's ``tokens``, and in ``wanted`` how many it
    should have had where it had fewer.
    ``encoder`` says the same of the blocks of an image encoder, their ``error`` on the calibration images.
    ``tuning`` is the loss at the start and at the end of a block that was learned, and the epoch that was kept."""
    blocks = [row for row in rows if row["kind"] == "unit" and "layers" in row]
    experts = [found for row in blocks if (found := BlockExperts.of(row)) is not None]
    fallbacks = [
        {"block": row["unit"], "layer": name, "why": note["fallback"]}
        for row in blocks
        for name, note in row["layers"].items()
        if note["fallback"]
    ]
    return {
        "schema": SCHEMA,
        "versions": dict(about.versions),
        "model": dict(about.model),
        "scheme": about.scheme,
        "sparsity": None if about.sparsity is None else {**about.sparsity, "mean": _mean_sparsity(blocks)},
        "activations": about.activations,
        "mixed_schemes": list(about.mixed),
        "kv_scheme": about.kv_scheme,
        "bits_per_weight": bits,
        "bit_budget": budget,
        "blocks_dropped": influence,
        "evaluation": [one.to_dict() for one in evaluations],
        "outputs": {name: dict(output) for name, output in outputs.items()},
        "calibration_tokens": about.calibration_tokens,
        "analysis": None if analysis is None else dict(analysis),
        "seconds": round(measured.seconds, 2),
        "seconds_by_kind": {kind: round(spent, 2) for kind, spent in measured.by_kind.items()},
        "bytes_read": measured.bytes_read,
        "peak_host_bytes": measured.peak_host,
        "peak_device_bytes": measured.peak_device,
        "fallbacks": fallbacks,
        "experts": [one.to_dict() for one in experts],
        "blocks": [{key: row.get(key) for key in BLOCK_KEYS} for row in blocks],
        "encoder": None if encoder is None else dict(encoder),
        "config": dict(about.config),
    }


def with_evaluations(metrics: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics with further evaluations; they take the place of those of the same thing by the same protocol."""
    new = {_identity(entry) for entry in entries}
    kept = [entry for entry in metrics["evaluation"] if _identity(entry) not in new]
    return {**metrics, "schema": SCHEMA, "evaluation": [*kept, *entries]}


def _identity(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What was measured; ``metric`` is there where one task has several."""
    return tuple(entry.get(key) for key in ("kind", "name", "protocol", "position", "metric"))


def _mean_sparsity(blocks: Sequence[Mapping[str, Any]]) -> float:
    """Mean over the pruned layers of the fraction of their weights that was pruned."""
    found: list[float] = [note["sparsity"] for row in blocks for note in row["layers"].values() if "sparsity" in note]
    return sum(found) / max(len(found), 1)
