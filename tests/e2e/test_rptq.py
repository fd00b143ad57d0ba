"""RPTQ as whole runs: what is written is what was evaluated, resumed runs, what clusters are good for, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cases import reload
from safetensors.torch import load_file, save_file

import llmc
from llmc.errors import ConfigError, ExportError, ModelError

CLUSTERS = {"R1_clusters": 8, "R2_clusters": 3, "R3_clusters": 3, "R4_clusters": 8, "R5_clusters": 8}
WEIGHT = {"bit": 4, "symmetric": False, "granularity": "per_cluster", "group_size": None}
ACT = {"bit": 4, "symmetric": False, "granularity": "per_cluster", "static": True}
FAMILIES = ["opt", "llama", "llama-tied", "mistral", "qwen2", "qwen3"]


@pytest.fixture
def rptq(case, source_of):
    """A run on a tiny checkpoint; ``act``, ``weight`` and ``special`` are varied."""

    def make(name="opt", act=None, weight=None, special=None, checkpoint=None, **changes):
        quant = {"method": "RPTQ", "weight": WEIGHT | (weight or {}), "special": CLUSTERS | (special or {})}
        quant |= {} if act == 16 else {"act": ACT | (act or {})}
        save = {"save_vllm": False, "save_fake": True}
        changes["save"] = save | changes.get("save", {})
        return case(checkpoint or source_of(name), "RPTQ", quant=quant, **changes)

    return make


def perplexity(result, position="fake_quant"):
    return next(found.value for found in result.perplexities if found.position == position)


def blocks(case):
    return json.loads((case.save_path / "metrics.json").read_text())["blocks"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_written_checkpoint_is_the_evaluated_model(rptq, name):
    """Without quantized activations Transformers' own model of the folder must give the run's perplexity: what is
    reordered cancels out, what a checkpoint can't say is undone."""
    run = rptq(name, act=16)
    result = run.compress()
    model = reload(run.save_path / "fake_quant_model")
    windows = result.perplexities[0].windows
    assert perplexity(result) == pytest.approx(whole_model(model, run, windows), rel=2e-6)
    assert perplexity(result) != pytest.approx(perplexity(result, "pretrain"), rel=1e-4)


def whole_model(model, run, count):
    """Perplexity of the first windows of the evaluation text, by the model as a whole."""
    from transformers import AutoTokenizer

    one = run.content["eval"]
    tokens = AutoTokenizer.from_pretrained(run.source)(Path(one["path"]).read_text(), return_tensors="pt").input_ids
    windows = tokens[:, : count * one["seq_len"]].reshape(count, one["seq_len"])
    losses = torch.stack([model(row[None], labels=row[None]).loss for row in windows])
    return float(losses.double().mean().exp())


@pytest.mark.parametrize("name", FAMILIES)
def test_it_runs(rptq, name):
    run = rptq(name)
    result = run.compress()
    print(perplexity(result), perplexity(result, "pretrain"))
