"""Whole runs with rotations that run with the model, and vLLM's folder as compressed-tensors reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, write_tokenizer
from compressed_tensors.transform import TransformConfig, apply_transform_config
from test_quantized_activations import evaluation_windows, measured, perplexity_of
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig

from llmc.algorithms import quarot
from llmc.cli import main
from llmc.errors import ExportError
from llmc.export.base import Layer
from llmc.export.vllm_rotations import check_rotations

ONLINE: dict[str, Any] = {"Quarot": {"online_rotate": True, "fp32_had": True}}
NOTHING = {"save_vllm": False, "save_fake": False}
A4 = {"bit": 4, "symmetric": True, "granularity": "per_token"}


@pytest.mark.parametrize("family", ["llama-tied", "mistral", "qwen2", "qwen3", "opt"])
def test_the_rotated_model_is_the_original_and_rounds_otherwise(case, exact, family):
    found = []
    for special in (ONLINE, {}):
        run = case(
            exact(family),
            ["Quarot", "GPTQ"],
            quant={"special": special, "act": A4},
            eval={"eval_pos": ["pretrain", "transformed", "fake_quant"]},
            save=NOTHING,
        )
        found.append({one.position: one.value for one in run.compress().perplexities})
    online, offline = found
    assert online["pretrain"] == offline["pretrain"]
    assert online["transformed"] == pytest.approx(online["pretrain"], rel=1e-5)
    assert online["fake_quant"] != pytest.approx(offline["fake_quant"], rel=1e-4)


def test_a_killed_run_measures_what_an_undisturbed_one_does(case, monkeypatch):
    class Killed(BaseException):
        pass

    def make() -> Case:
        quant = {"special": ONLINE, "act": A4}
        return case(method=["Quarot", "GPTQ"], quant=quant, save=NOTHING, base={"checkpoint_every": 2})

    expected = [one.value for one in make().compress().perplexities]
    run, seen, real = make(), iter(range(3)), quarot.Quarot.block

    def dying(*args: Any) -> None:
        if next(seen, None) is None:
            raise Killed
        real(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(quarot.Quarot, "block", dying)
        run.compress()
    assert [one.value for one in run.compress().perplexities] == expected


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose feed-forward is 96 = 3 · 32 channels wide."""
    folder = tmp_path_factory.mktemp("narrow") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=208,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def with_transforms(model: nn.Module, folder: Path) -> nn.Module:
    """The loaded model with what its configuration says is to be done while it runs, as compressed-tensors does it."""
    written = json.loads((folder / "config.json").read_text())["quantization_config"]["transform_config"]
    config = TransformConfig.model_validate(written)
    for scheme in config.config_groups.values():
        assert len(scheme.apply) == 2
        scheme.apply = [place for place in scheme.apply if place.is_online()]  # the weights hold the others
    apply_transform_config(model, config)
    return model


@pytest.mark.parametrize(("width", "head_dim"), [(128, None), (96, 32)])
def test_compressed_tensors_rotates_as_the_evaluated_model_does(case, source, narrow, width, head_dim):
    options = {"online_rotate": True, "online_blocks": head_dim is not None}
    quant = {"special": {"Quarot": options}}
    run = case(source if width == 128 else narrow, ["Quarot", "GPTQ"], quant=quant, save={"save_fake": False})
    result = run.compress()
    folder = run.save_path / "vllm_quant_model"
    written = json.loads((folder / "config.json").read_text())["quantization_config"]["transform_config"]
    assert written["config_groups"]["R4"]["head_dim"] == head_dim
    loading = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=loading).eval()
    windows = evaluation_windows(run)
    assert perplexity_of(model, windows) != pytest.approx(measured(result), rel=1e-2), "it must be rotated"
    assert perplexity_of(with_transforms(model, folder), windows) == pytest.approx(measured(result), rel=1e-4)


def test_a_folder_without_online_rotations_says_nothing_of_them(case):
    run = case(method=["Quarot", "RTN"])
    run.compress()
    written = json.loads((run.save_path / "vllm_quant_model" / "config.json").read_text())
    assert not written["quantization_config"].get("transform_config")


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"save": {"save_vllm": False}}, ["online_rotate: True with save_fake", "write save_vllm"]),
        ("llama", {"save": {**NOTHING, "save_trans": True}}, ["online_rotate: True with save_trans", "[down_proj]"]),
        ("opt", {"save": {"save_fake": False}}, ["fc2", "doesn't rotate the input of a Linear with a bias"]),
        (
            "llama",
            {
                "save": {"save_fake": False},
                "quant": {
                    "special": ONLINE,
                    "kvcache": {
                        "method": "Naive",
                        "bit": "e4m3",
                        "symmetric": True,
                        "granularity": "per_tensor",
                        "static": True,
                    },
                },
            },
            ["with quant.kvcache", "vLLM doesn't rotate keys", "remove quant.kvcache"],
        ),
        (
            "llama",
            {"save": NOTHING, "quant": {"special": ONLINE | {"Awq": {"layers": ["down_proj"]}}}},
            ["layers of Awq", "nothing in front of down_proj can absorb a scale"],
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_before_a_weight_is_read(case, source_of, capsys, family, changes, said):
    methods = ["Quarot", "Awq", "RTN"] if "Awq" in str(changes.get("quant")) else ["Quarot", "RTN"]
    run = case(source_of(family), methods, **{"quant": {"special": ONLINE}} | changes)
    assert main(run.arguments) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert [part for part in said if part not in message] == [], message
    assert not run.save_path.exists()


def test_a_width_that_is_no_power_of_two_needs_blocks(case, narrow, capsys):
    run = case(narrow, "Quarot", quant={"special": {"online_rotate": True}}, save={"save_fake": False})
    assert main(run.arguments) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "not of 96" in message and "set online_blocks: True, which rotates blocks of 32 channels" in message


def test_a_width_without_a_hadamard_matrix_is_refused(case, capsys, monkeypatch):
    monkeypatch.setattr(quarot, "hadamard", lambda size: None if size == 128 else object())
    run = case(method="Quarot", quant={"special": {"online_rotate": True}}, save=NOTHING)
    assert main(run.arguments) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "a Hadamard matrix of order 128 (channels between the feed-forward's Linears)" in message


def test_rotations_that_vllm_runs_come_with_a_warning():
    layers = [Layer("a.down", 8, 32, None, ("a.down",), rotated=order) for order in (None, 32, 16)]
    assert check_rotations(layers[:1], None) == []
    assert "their output is wrong" in check_rotations(layers, None)[0]
    with pytest.raises(ExportError, match="not of 12"):
        check_rotations([Layer("a.down", 8, 12, None, ("a.down",), rotated=12)], None)
