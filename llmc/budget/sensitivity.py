"""``sensitivity.json``: what each candidate scheme costs in each layer, as data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

SCHEMA = 1
FILE = "sensitivity.json"
_HERE = "quant.mix_bits.from"
_AGAIN = "measure it again: python -m llmc sensitivity --config FILE"


@dataclass(frozen=True)
class Trial:
    """A layer with a candidate.

    Attributes:
        loss: nats per token that it is expected to cost: how far the model's distribution of the next token moves.
        error: relative error of the layer's output, ``|(W - W')X|² / |WX|²``.
        bits: per weight, scales and zero points included.
    """

    loss: float
    error: float
    bits: float


@dataclass(frozen=True)
class LayerSensitivity:
    """A Linear.

    Attributes:
        name: in the checkpoint.
        block: its block's number.
        kind: its name inside the block.
        rows: output channels.
        columns: input channels.
        importance: nats per token that a relative error of 1 would cost.
        together: the number of its group: layers of one group get one scheme.
        trials: by the candidates, in their order.
    """

    name: str
    block: int
    kind: str
    rows: int
    columns: int
    importance: float
    together: int
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of a model.

    Attributes:
        model: its ``path``, and the digest ``headers`` of its tensors' names, shapes and dtypes.
        how: with which ``method`` (the quantizer that rounded), and how many calibration ``tokens``.
        candidates: the name and the section ``quant.weight`` of each.
        layers: in the model's order.
    """

    model: Mapping[str, str]
    how: Mapping[str, Any]
    candidates: tuple[Mapping[str, Any], ...]
    layers: tuple[LayerSensitivity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values. ``table`` holds the same losses for a plot: of each kind of layer a row for each block, in it
        the loss with each candidate."""
        return {
            "schema": SCHEMA,
            "model": dict(self.model),
            "how": dict(self.how),
            "candidates": [dict(one) for one in self.candidates],
            "layers": [asdict(layer) for layer in self.layers],
            "table": self.table(),
        }

    def table(self) -> dict[str, Any]:
        """``{"blocks": [...], "kinds": [...], "loss": {candidate: [kind][block]}}``; of experts of one kind, the sum;
        None where a block has no such layer."""
        blocks = sorted({layer.block for layer in self.layers})
        sums: dict[tuple[str, int], list[float]] = {}
        for layer in self.layers:
            losses = sums.setdefault((collapsed_kind(layer.kind), layer.block), [0.0] * len(self.candidates))
            sums[collapsed_kind(layer.kind), layer.block] = [
                before + trial.loss for before, trial in zip(losses, layer.trials, strict=True)
            ]
        kinds = list(dict.fromkeys(kind for kind, _ in sums))
        cells = {
            one["name"]: [
                [sums[kind, block][index] if (kind, block) in sums else None for block in blocks] for kind in kinds
            ]
            for index, one in enumerate(self.candidates)
        }
        return {"blocks": blocks, "kinds": kinds, "loss": cells}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Sensitivity:
        """The inverse of ``to_dict``.

        Raises:
            KeyError, TypeError, ValueError: it isn't that.
        """
        layers = tuple(
            LayerSensitivity(**{**layer, "trials": tuple(Trial(**trial) for trial in layer["trials"])})
            for layer in plain["layers"]
        )
        candidates = tuple(plain["candidates"])
        if any(len(layer.trials) != len(candidates) for layer in layers):
            raise ValueError("a layer hasn't been measured with every candidate")
        return cls(plain["model"], plain["how"], candidates, layers)


def collapsed_kind(kind: str) -> str:
    """One name for the same Linear of all experts: numbers become ``*``."""
    return ".".join("*" if part.isdecimal() else part for part in kind.split("."))


def read_sensitivity(path: str, headers: str) -> Sensitivity:
    """The file of ``quant.mix_bits.from``.

    Args:
        path: where it is.
        headers: the digest of the model that is to be compressed.

    Raises:
        ConfigError: it can't be read, or is of another version or model.
    """
    try:
        plain = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{_HERE}: {path} can't be read: {problem}", _AGAIN) from problem
    schema = plain.get("schema") if isinstance(plain, dict) else None
    if schema != SCHEMA or "candidates" not in plain:
        raise ConfigError(f"{_HERE}: {path} isn't a sensitivity.json of schema {SCHEMA}, but {schema!r}", _AGAIN)
    try:
        found = Sensitivity.from_dict(plain)
    except (KeyError, TypeError, ValueError) as problem:
        raise ConfigError(f"{_HERE}: {path} is damaged: {problem}", _AGAIN) from problem
    if found.model.get("headers") != headers:
        raise ConfigError(f"{_HERE}: {path} is of another model, {found.model.get('path')}", _AGAIN)
    return found


def most_sensitive(found: Sensitivity) -> Iterator[tuple[str, Sequence[Trial]]]:
    """Layers with what each candidate costs, the most sensitive first: by the mean of their losses per weight, relative
    to those of the mean layer with the same candidate; those of one group together."""
    groups: dict[int, list[LayerSensitivity]] = {}
    for layer in found.layers:
        groups.setdefault(layer.together, []).append(layer)
    totals = [sum(layer.trials[index].loss for layer in found.layers) for index in range(len(found.candidates))]

    def weight(group: list[LayerSensitivity]) -> float:
        size = sum(layer.rows * layer.columns for layer in group)
        shares = [
            sum(layer.trials[index].loss for layer in group) / total for index, total in enumerate(totals) if total
        ]
        return sum(shares) / size

    for group in sorted(groups.values(), key=weight, reverse=True):
        size = sum(layer.rows * layer.columns for layer in group)
        trials = [
            Trial(
                sum(layer.trials[index].loss for layer in group),
                max(layer.trials[index].error for layer in group),
                sum(layer.trials[index].bits * layer.rows * layer.columns for layer in group) / size,
            )
            for index in range(len(found.candidates))
        ]
        kinds = dict.fromkeys(collapsed_kind(layer.kind) for layer in group)
        yield f"block {group[0].block}: {', '.join(kinds)}", trials
