"""Statistics as the analysis writes them, with invented numbers, for runs that are looked at by reports."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SUBSETS = {
    "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj+mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}


def spread(chance: random.Random, scale: float) -> dict[str, Any]:
    """Of one subset's input."""
    worst = [{"channel": chance.randrange(64), "ratio": chance.uniform(7, 90)} for _ in range(3)]
    return {
        "kurtosis": {
            "tensor": scale * chance.uniform(0.8, 1.25),
            "channel": {"mean": 4.0, "std": 1.0},
            "token": {"mean": 9.0, "std": 3.0},
        },
        "outliers": {"count": chance.randrange(1, 5), "share": chance.uniform(0.05, 0.6), "worst": worst},
        "clipped": None,
    }


def add_analysis(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Add statistics and surfaces to a finished run of a dense model; returns its metrics."""
    chance, metrics = random.Random(seed), json.loads((folder / "metrics.json").read_text())
    for row in metrics["blocks"]:
        for note in row["layers"].values():
            note |= {"cosine": 1 - chance.uniform(1e-4, 1e-2), "sqnr_db": chance.uniform(12, 30)}
            note |= {"bits": chance.choice([4.5, 4.25, 8.0])}
            kurtosis = {"tensor": chance.uniform(2, 9), "channel": {"mean": 3.0, "std": 0.2}}
            note["weight"] = {"kurtosis": kurtosis, "clipped": chance.uniform(0, 0.01), "zeros": chance.uniform(0, 0.2)}
        row["activations"] = {
            key: {"original": spread(chance, 80), "transformed": spread(chance, 5)} for key in SUBSETS
        }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    add_surfaces(folder, [0, 3])
    return metrics


def add_surfaces(folder: Path, blocks: list[int]) -> None:
    """Two ridges that only the original has."""
    generator, tensors = np.random.default_rng(0), {}
    for block in blocks:
        for layer in SUBSETS.values():
            flat = generator.uniform(0.2, 1, (16, 64)).astype(np.float32)
            ridged = flat.copy()
            ridged[:, [9, 40]] *= 30
            tensors |= {f"model.layers.{block}.{layer}|original": ridged}
            tensors |= {f"model.layers.{block}.{layer}|transformed": flat}
    channels = {name: 64 for name in tensors}
    save_file(tensors, folder / "surfaces.safetensors", {"tokens": "2048", "channels": json.dumps(channels)})
