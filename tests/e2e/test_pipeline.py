"""Whole runs on tiny models: what is measured is what is written, and what is written loads."""

from __future__ import annotations

import json
import shutil
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import WINDOW, WINDOWS, Case, files_of, reload
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CompressedTensorsConfig

import llmc
from llmc.cli import main
from llmc.stream.headers import read_headers
from llmc.stream.source import BlockSource

METHODS = ["RTN", "GPTQ", "Awq"]
ADAPTERS = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "opt"]
VLLM, FAKE, TRANS = "vllm_quant_model", "fake_quant_model", "transformed_model"


def evaluation_windows(case: Case) -> Tensor:
    text = Path(case.content["eval"]["path"]).read_text()
    ids = AutoTokenizer.from_pretrained(case.source)(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: WINDOW * WINDOWS]).view(WINDOWS, WINDOW)


@torch.no_grad()
def logits(folder: Path | str, windows: Tensor, **options: Any) -> list[Tensor]:
    model = reload(folder, **options)
    return [model(input_ids=window[None], use_cache=False).logits[0] for window in windows]


def whole_model_perplexity(folder: Path, windows: Tensor) -> float:
    pairs = zip(logits(folder, windows), windows, strict=True)
    return exp(float(torch.stack([nn.functional.cross_entropy(y[:-1], ids[1:]) for y, ids in pairs]).double().mean()))


def perplexities(result: llmc.Result) -> dict[str, float]:
    return {one.position: one.value for one in result.perplexities}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_logits(case: Case, left: str, right: str) -> bool:
    windows = evaluation_windows(case)
    dense = CompressedTensorsConfig(dequantize=True)
    a = logits(case.save_path / left, windows, quantization_config=dense)
    b = logits(case.save_path / right, windows)
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ADAPTERS)
def test_both_perplexities_are_those_of_transformers_and_the_vllm_folder_is_the_evaluated_model(
    case, source_of, family, method
):
    run = case(source_of(family), method)
    measured, windows = perplexities(run.compress()), evaluation_windows(run)
    assert measured["pretrain"] == pytest.approx(whole_model_perplexity(run.source, windows), rel=1e-6)
    assert measured["fake_quant"] == pytest.approx(whole_model_perplexity(run.save_path / FAKE, windows), rel=1e-6)
    assert measured["fake_quant"] != pytest.approx(measured["pretrain"], rel=1e-4)
    assert same_logits(run, VLLM, FAKE)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize(("bit", "symmetric"), [(4, True), (4, False), (8, True)])
@pytest.mark.parametrize("method", METHODS)
def test_the_vllm_folder_of_every_scheme_is_the_evaluated_model(case, method, bit, symmetric, group):
    grain = {"granularity": "per_channel"} if group is None else {"granularity": "per_group", "group_size": group}
    run = case(method=method, quant={"weight": {"bit": bit, "symmetric": symmetric, **grain}}, eval={"eval_pos": []})
    run.compress()
    assert same_logits(run, VLLM, FAKE)
    scheme = json.loads((run.save_path / VLLM / "config.json").read_text())["quantization_config"]
    weights = scheme["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"], weights["group_size"]) == (bit, symmetric, group)


@pytest.mark.parametrize("method", METHODS)
def test_the_transformed_model_computes_what_the_original_does(case, method):
    positions = ["pretrain", "transformed", "fake_quant"]
    run = case(method=method, save={"save_trans": True, "save_vllm": False}, eval={"eval_pos": positions})
    measured, windows = perplexities(run.compress()), evaluation_windows(run)
    original, transformed = tensors_of(run.source), tensors_of(run.save_path / TRANS)
    changed = {name for name in original if not torch.equal(original[name], transformed[name])}
    assert bool(changed) == (method == "Awq")
    assert measured["transformed"] == pytest.approx(whole_model_perplexity(run.save_path / TRANS, windows), rel=1e-6)
    assert measured["transformed"] == pytest.approx(measured["pretrain"], rel=1e-2)
    assert {tensor.dtype for tensor in transformed.values()} == {torch.bfloat16}


def test_the_output_folders_have_the_checkpoints_side_files(case, damaged):
    (damaged / "chat_template.jinja").write_text("{{ messages }}")
    (damaged / "notes.txt").write_bytes(b"\xff\x00")
    run = case(damaged, save={"save_trans": True})
    outputs = run.compress().outputs
    assert outputs.keys() == {"save_vllm", "save_fake", "save_trans"}
    weights = {"config.json", "model.safetensors.index.json", *(file.name for file in damaged.glob("*.safetensors"))}
    wanted = {name: digest for name, digest in files_of(damaged).items() if name not in weights}
    for output in outputs.values():
        written = files_of(Path(output["folder"]))
        assert written.items() >= wanted.items()
        assert {name for name in written if not name.endswith(".safetensors")} == {
            *wanted,
            "config.json",
            "model.safetensors.index.json",
        }


def test_the_metrics_tell_everything_that_the_run_measured(case):
    run = case(method="GPTQ")
    result = run.compress()
    metrics = json.loads((run.save_path / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result.metrics))
    size = sum(entry.nbytes for entry in read_headers(run.source).values())
    assert metrics["bytes_read"] == metrics["model"]["bytes"] == size
    assert metrics["calibration_tokens"] == 4 * 16
    assert [block["unit"] for block in metrics["blocks"]] == [f"block-{index}" for index in range(4)]
    for block in metrics["blocks"]:
        assert len(block["layers"]) == 7
        assert all(0 < layer["error"] < 0.2 for layer in block["layers"].values())
        assert 0 < block["error"] < 1
    assert [one["position"] for one in metrics["evaluation"]] == ["pretrain", "fake_quant"]
    for one in metrics["evaluation"]:
        assert "gptq protocol" in one["protocol"]
        assert f"{WINDOWS} windows of {WINDOW}" in one["protocol"]
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["config"]["quant"]["weight"]["bit"] == 4


def test_ignored_linears_keep_their_bytes_and_are_named_to_the_backend(case):
    run = case(method="GPTQ", ignored_layers={"layer_names": ["mlp.down_proj"], "block_ids": [1, 3]})
    run.compress()
    ignored = {f"model.layers.{index}.mlp.down_proj" for index in (1, 3)}
    original, written = tensors_of(run.source), tensors_of(run.save_path / VLLM)
    packed = {name.removesuffix(".weight_packed") for name in written if name.endswith(".weight_packed")}
    assert len(packed) == 4 * 7 - 2
    assert not ignored & packed
    assert all(torch.equal(written[f"{name}.weight"], original[f"{name}.weight"]) for name in ignored)
    scheme = json.loads((run.save_path / VLLM / "config.json").read_text())["quantization_config"]
    assert {"lm_head", *ignored} <= set(scheme["ignore"])
    assert same_logits(run, VLLM, FAKE)


def test_a_dry_run_shows_every_layer_reads_no_weight_and_writes_nothing(case, capsys, monkeypatch):
    run = case(method="GPTQ", ignored_layers={"layer_names": ["mlp.down_proj"]})
    monkeypatch.setattr(BlockSource, "_read", lambda self, unit: pytest.fail(f"{unit} is read"))
    assert main([*run.arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    linears = [name.removesuffix(".weight") for name in tensors_of(run.source) if "_proj.weight" in name]
    assert len(linears) == 4 * 7
    for name in linears:
        line = next(line for line in shown.splitlines() if line.startswith(name))
        assert ("kept" in line) == ("down_proj" in name)
    for said in (
        "save_vllm (checked)",
        "save_fake (checked)",
        "read",
        "disk",
        "host memory",
        "embeddings, norms, routers, head",
    ):
        assert said in shown
    assert not run.save_path.exists()


def test_a_folder_with_bin_files_gives_what_its_safetensors_give(case, damaged, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    torch.save(tensors_of(damaged), damaged / "pytorch_model.bin")
    for file in damaged.glob("*.safetensors*"):
        file.unlink()
    before = files_of(damaged)
    from_bin, from_safetensors = case(damaged, "GPTQ"), case(method="GPTQ")
    from_bin.compress()
    from_safetensors.compress()
    assert from_bin.written() == from_safetensors.written()
    assert files_of(damaged) == before


@pytest.mark.parametrize(
    "override",
    [
        "base.host_memory_gb=1e-6",
        "base.forward=replay",
        "base.forward=staged",
        "base.checkpoint_every=1",
        "base.seed=42",
    ],
)
@pytest.mark.parametrize("method", ["GPTQ", "Awq"])
def test_how_a_run_is_done_does_not_change_a_byte(case, method, override):
    plain, other = case(method=method), case(method=method)
    measured = perplexities(plain.compress())
    assert perplexities(other.compress(override)) == measured
    assert other.written() == plain.written()


def test_the_seed_decides_on_the_calibration_text_and_on_nothing_else(case):
    runs = [case(method="GPTQ", calib={"preproc": "wikitext2_gptq", "seed": seed}) for seed in (1, 1, 2)]
    for run in runs:
        run.compress()
    first, again, other = (run.written() for run in runs)
    assert first == again
    blocks = {f"{folder}/model-{index:05d}-of-00006.safetensors" for folder in (VLLM, FAKE) for index in (2, 3, 4, 5)}
    assert {name for name in first if first[name] != other[name]} == blocks


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_two_measure_the_same(case, method):
    one, two = case(method=method), case(method=method, calib={"bs": 2}, eval={"bs": 2})
    expected, found = perplexities(one.compress()), perplexities(two.compress())
    assert found["pretrain"] == pytest.approx(expected["pretrain"], rel=1e-6)
    assert found["fake_quant"] == pytest.approx(expected["fake_quant"], rel=2e-2)
    assert same_logits(two, VLLM, FAKE)


def test_two_evaluations_of_one_pass_are_told_apart(case, texts):
    run = case()
    short = {**run.content["eval"], "seq_len": 10, "num_chunks": 2, "eval_pos": ["fake_quant"]}
    run.content["eval"] = [run.content["eval"], short]
    found = [(one.position, one.windows, one.seq_len) for one in run.compress().perplexities]
    assert found == [("pretrain", 3, 24), ("fake_quant", 3, 24), ("fake_quant", 2, 10)]


def test_without_a_folder_a_run_measures_and_leaves_nothing(case, tmp_path):
    run = case()
    before = files_of(tmp_path)
    measured = perplexities(run.compress("save=null"))
    assert measured == perplexities(run.compress())
    shutil.rmtree(run.save_path)
    assert files_of(tmp_path) == before


def test_the_summary_has_the_line_that_scripts_look_for(case, capsys):
    run = case()
    assert main(run.arguments) == 0
    shown = capsys.readouterr().out
    metrics = json.loads((run.save_path / "metrics.json").read_text())
    for one in metrics["evaluation"]:
        assert f"EVAL: ppl on text is {one['value']:.4f}" in shown
    assert f"vllm serve {run.save_path / VLLM}" in shown
