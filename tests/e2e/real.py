"""The real model in the tests: where it is, a cut of its first blocks, and the runs that have golden perplexities."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

import llmc

BLOCKS = 6
METHODS = ("RTN", "GPTQ", "Awq")
GOLDEN = Path(__file__).parents[1] / "golden" / "cut6.json"


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
    shared = Path(os.environ.get("LLMC_SHARED") or Path(__file__).parents[3] / "shared")
    file = shared / "data" / "wikitext2" / f"{split}.txt"
    if not file.is_file():
        raise AssertionError(f"{file} is missing: set LLMC_SHARED to the folder that holds data/wikitext2")
    return str(file)


def cut(model: Path, folder: Path, blocks: int = BLOCKS) -> Path:
    """Write a checkpoint of the first blocks, with the model's embeddings, final norm and tokenizer."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    dropped = tuple(f"model.layers.{index}." for index in range(blocks, 1000))
    kept = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            kept |= {name: stored.get_tensor(name) for name in stored.keys() if not name.startswith(dropped)}  # noqa: SIM118
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    return folder


def configuration(model: Path, method: str) -> dict[str, Any]:
    """3 bits, asymmetric, groups of 64, on a few windows."""
    plain = {"name": "text", "bs": 1}
    return {
        "base": {"device": "cpu"},
        "model": {"path": str(model), "torch_dtype": "float32"},
        "calib": {**plain, "path": text("valid"), "n_samples": 8, "seq_len": 256, "preproc": "sequential"},
        "eval": {
            **plain,
            "path": text("test"),
            "seq_len": 512,
            "num_chunks": 4,
            "eval_pos": ["pretrain", "fake_quant"],
        },
        "quant": {
            "method": method,
            "weight": {"bit": 3, "symmetric": False, "granularity": "per_group", "group_size": 64},
        },
    }


def measure(model: Path) -> dict[str, float]:
    """Perplexities of the cut model: the original's, and each method's."""
    found: dict[str, float] = {}
    for method in METHODS:
        for one in llmc.compress(configuration(model, method)).perplexities:
            found["original" if one.position == "pretrain" else method] = one.value
    return found
