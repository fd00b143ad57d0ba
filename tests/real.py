"""The real model in the tests: where it is, and the runs that have golden perplexities."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import llmc

METHODS: dict[str, dict[str, Any]] = {  # samples of calibration text and options of each method
    "RTN": {"n_samples": 1, "special": {}},
    "GPTQ": {"n_samples": 32, "special": {"actorder": True, "static_groups": True}},
    "Awq": {"n_samples": 4, "special": {}},
}
GOLDEN = Path(__file__).parent / "golden" / "w3_few_tokens.json"


def real_model() -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    named = os.environ.get("LLMC_TEST_MODEL")
    if not named or not (Path(named) / "config.json").is_file():
        raise AssertionError(
            f"LLMC_TEST_MODEL is {named!r}; it must be the folder of the demonstration model: "
            "run the tests with `bash scripts/test.sh`, which makes it"
        )
    return Path(named)


def text(split: str) -> str:
    """WikiText-2: ``valid`` to calibrate, ``test`` to evaluate."""
    shared = Path(os.environ.get("LLMC_SHARED") or Path(__file__).parents[2] / "shared")
    file = shared / "data" / "wikitext2" / f"{split}.txt"
    if not file.is_file():
        raise AssertionError(f"{file} is missing: set LLMC_SHARED to the folder that holds data/wikitext2")
    return str(file)


def configuration(model: Path, method: str) -> dict[str, Any]:
    """3 bits, asymmetric, groups of 64, on a few windows; all blocks, since the first ones alone predict nothing."""
    plain, chosen = {"name": "text", "bs": 1}, METHODS[method]
    return {
        "base": {"device": "cpu"},
        "model": {"path": str(model), "torch_dtype": "float32"},
        "calib": {
            **plain,
            "path": text("valid"),
            "n_samples": chosen["n_samples"],
            "seq_len": 128,
            "preproc": "sequential",
        },
        "eval": {
            **plain,
            "path": text("test"),
            "seq_len": 512,
            "num_chunks": 2,
            "eval_pos": ["pretrain", "fake_quant"] if method == "RTN" else ["fake_quant"],
        },
        "quant": {
            "method": method,
            "special": chosen["special"],
            "weight": {"bit": 3, "symmetric": False, "granularity": "per_group", "group_size": 64},
        },
    }


def measure(model: Path) -> dict[str, float]:
    """Perplexities of the original and of each method's model, and the mean relative error of a Linear's output."""
    torch.set_num_threads(1)  # another number of threads sums in another order
    found: dict[str, float] = {}
    for method in METHODS:
        result = llmc.compress(configuration(model, method))
        for one in result.perplexities:
            found["original" if one.position == "pretrain" else method] = one.value
        errors = [layer["error"] for block in result.metrics["blocks"] for layer in block["layers"].values()]
        found[f"{method} layers"] = sum(errors) / len(errors)
    return found
