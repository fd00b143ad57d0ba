"""Outlier channels that change nothing in the float model break 8-bit activations; what suppresses them mends it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from real import configuration, real_model
from safetensors import safe_open
from safetensors.torch import save_file

import llmc

CHANNELS = (7, 100, 333)
FACTOR = 64.0  # a power of two: nothing is rounded
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@pytest.fixture(scope="module")
def injected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model with three channels behind every norm 64 times larger, and their readers' weights smaller."""
    source, folder = real_model(), tmp_path_factory.mktemp("outliers") / "model"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, Any] = {}
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name in [name for name in tensors if name.rpartition(".")[0].endswith(tuple(READERS))]:
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        tensors[name][list(CHANNELS)] *= FACTOR
        for reader in READERS[norm]:
            tensors[f"{block}.{reader}.weight"][:, list(CHANNELS)] /= FACTOR
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def perplexity(injected):
    """Perplexity of a method with 8 bits for weights and activations, on the injected model."""
    found: dict[tuple[str, ...], dict[str, float]] = {}

    def get(*methods: str) -> dict[str, float]:
        if methods not in found:
            content = configuration(injected, "RTN")
            content["calib"] |= {"n_samples": 4}
            content["eval"] |= {"num_chunks": 1}
            content["quant"] = {
                "method": list(methods),
                "weight": {"bit": 8, "symmetric": True, "granularity": "per_channel"},
                "act": {"bit": 8, "symmetric": True, "granularity": "per_token"},
            }
            found[methods] = {one.position: one.value for one in llmc.compress(content).perplexities}
        return found[methods]

    return get


def test_the_float_model_is_the_same(perplexity):
    content = configuration(real_model(), "RTN")
    content["eval"] |= {"num_chunks": 1, "eval_pos": ["pretrain"]}
    del content["quant"], content["calib"]
    assert llmc.compress(content).perplexities[0].value == pytest.approx(perplexity("RTN")["pretrain"], rel=1e-5)


def test_rounding_alone_collapses(perplexity):
    assert perplexity("RTN")["fake_quant"] > 1.5 * perplexity("RTN")["pretrain"]


@pytest.mark.parametrize("method", ["SmoothQuant", "OsPlus", "Quarot"])
def test_suppressing_outliers_recovers_it(perplexity, method):
    assert perplexity(method)["fake_quant"] < 1.05 * perplexity(method)["pretrain"]
