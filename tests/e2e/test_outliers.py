"""Outlier channels that change nothing in the float model break 8-bit activations; what suppresses them mends it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from real import configuration, real_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import llmc

CHANNELS, BLOCKS = 4, 6
FACTOR = 64.0  # a power of two: nothing is rounded
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def first_blocks(folder: Path) -> dict[str, Tensor]:
    """Make ``folder`` the real model's first blocks but for their weights, which are returned."""
    source = real_model()
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((source / "config.json").read_text())
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": BLOCKS}))
    tensors: dict[str, Tensor] = {}
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    kept = tuple(f"model.layers.{index}." for index in range(BLOCKS))
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.layers.") or name.startswith(kept)
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The first blocks as they are, and with the largest channels behind every norm 64 times larger and their readers'
    weights smaller."""
    made = {name: tmp_path_factory.mktemp("outliers") / name for name in ("plain", "injected")}
    for name, folder in made.items():
        tensors = first_blocks(folder)
        for norm in [norm for norm in tensors if norm.removesuffix(".weight").endswith(tuple(READERS))]:
            block, _, kind = norm.removesuffix(".weight").rpartition(".")
            chosen = tensors[norm].float().abs().topk(CHANNELS if name == "injected" else 0).indices
            tensors[norm][chosen] *= FACTOR
            for reader in READERS[kind]:
                tensors[f"{block}.{reader}.weight"][:, chosen] /= FACTOR
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def run(models):
    """Perplexity of the original and relative error of the hidden state behind the last block, with 8 bits for weights
    and activations."""
    found: dict[tuple[str, str], tuple[float, float]] = {}

    def get(model: str, method: str) -> tuple[float, float]:
        if (model, method) not in found:
            content = configuration(models[model], "RTN")
            content["calib"] |= {"n_samples": 2}
            content["eval"] |= {"num_chunks": 1}
            content["quant"] = {
                "method": method,
                "weight": {"bit": 8, "symmetric": True, "granularity": "per_channel"},
                "act": {"bit": 8, "symmetric": True, "granularity": "per_token"},
            }
            result = llmc.compress(content)
            original = next(one.value for one in result.perplexities if one.position == "pretrain")
            found[model, method] = original, result.metrics["blocks"][-1]["error"]
        return found[model, method]

    return get


def test_the_float_model_is_the_same(run):
    assert run("injected", "RTN")[0] == pytest.approx(run("plain", "RTN")[0], rel=1e-5)


def test_rounding_alone_collapses(run):
    assert run("injected", "RTN")[1] > 30 * run("plain", "RTN")[1]


@pytest.mark.parametrize("method", ["SmoothQuant", "OsPlus", "Quarot"])
def test_suppressing_outliers_recovers_it(run, method):
    assert run("injected", method)[1] < 4 * run("plain", "RTN")[1]
