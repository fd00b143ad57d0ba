"""Whole runs with quantized activations: what is measured is what other libraries compute from the written folder."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path

import pytest
import torch
from cases import WINDOW, WINDOWS, Case
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

FP8 = {"bit": "e4m3", "symmetric": True}
INT8 = {"bit": 8, "symmetric": True}
STATIC = {"granularity": "per_tensor", "static": True}


def evaluation_windows(case: Case) -> Tensor:
    text = Path(case.content["eval"]["path"]).read_text()
    ids = AutoTokenizer.from_pretrained(case.source)(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: WINDOW * WINDOWS]).view(WINDOWS, WINDOW)


@torch.no_grad()
def perplexity_of(model: nn.Module, windows: Tensor) -> float:
    logits = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in windows]
    losses = [nn.functional.cross_entropy(y[:-1], ids[1:]) for y, ids in zip(logits, windows, strict=True)]
    return exp(float(torch.stack(losses).double().mean()))


def measured(result) -> float:
    return next(one.value for one in result.perplexities if one.position == "fake_quant")


@pytest.mark.parametrize(
    ("method", "weight", "act"),
    [
        ("RTN", {**FP8, "granularity": "per_channel"}, {**FP8, "granularity": "per_token"}),
        ("GPTQ", {**FP8, "granularity": "per_channel"}, {**FP8, **STATIC, "calib_algo": "static_hist"}),
        ("RTN", {**INT8, "granularity": "per_channel"}, {"bit": 8, "symmetric": False, **STATIC}),
        ("GPTQ", {**INT8, "granularity": "per_channel"}, {"bit": 8, "symmetric": False, "granularity": "per_token"}),
    ],
    ids=["fp8 dynamic", "fp8 static", "int8 static asym", "int8 dynamic asym"],
)
def test_transformers_and_compressed_tensors_run_the_folder_to_the_same_perplexity(case, method, weight, act):
    one = case(method=method, quant={"weight": weight, "act": act})
    result = one.compress()
    folder = one.save_path / "vllm_quant_model"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig()
    )
    windows = evaluation_windows(one)
    assert measured(result) == pytest.approx(perplexity_of(model.eval(), windows), rel=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(one.save_path / "fake_quant_model", dtype=torch.float32)
    assert measured(result) != pytest.approx(perplexity_of(plain.eval(), windows), rel=2e-4)


def test_the_plan_and_the_metrics_name_the_activations(case, capsys):
    from llmc.cli import main

    act = {**INT8, **STATIC}
    one = case(quant={"weight": {**INT8, "granularity": "per_channel"}, "act": act})
    assert main([*one.arguments, "--dry-run"]) == 0
    assert "28 x W8 channel sym, A8 tensor sym static" in capsys.readouterr().out
    assert not one.save_path.exists()
    one.compress()
    metrics = json.loads((one.save_path / "metrics.json").read_text())
    assert metrics["activations"]["static"] == {"kind": "StaticMinMax"}
    assert metrics["activations"]["granularity"] == {"kind": "PerTensor"}
    for block in metrics["blocks"]:
        assert set(block["inputs"]) == {
            "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj+mlp.up_proj",
            "mlp.down_proj",
        }
        assert all(lo < 0 < hi for lo, hi in block["inputs"].values())


@pytest.mark.parametrize("bit", ["mxfp4", "nvfp4", "mxfp8"])
def test_the_name_of_a_micro_format_is_all_that_is_needed(case, bit):
    one = case(method="GPTQ", quant={"weight": {"bit": bit}, "act": {"bit": bit}}, save={"save_vllm": False})
    result = one.compress()
    pretrain = next(one.value for one in result.perplexities if one.position == "pretrain")
    assert 0.5 < measured(result) / pretrain < 2
    assert result.metrics["scheme"]["granularity"]["size"] == (16 if bit == "nvfp4" else 32)
