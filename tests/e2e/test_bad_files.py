"""Checkpoints, texts and output folders that no run can use: one message each, before anything is read or written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import words
from refusals import contains
from transformers import Gemma3nTextConfig, MambaConfig

from llmc import workspace
from llmc.algorithms import options_types
from llmc.cli import main
from llmc.config import load_config
from llmc.prepare import prepare
from llmc.stream.headers import read_headers

# --- the checkpoint ------------------------------------------------------------------------------------------------


def test_a_checkpoint_folder_that_is_not_there(case, refused, tmp_path):
    contains(refused(case(tmp_path / "nowhere")), "nowhere", "model.path")


def test_an_index_that_names_a_shard_that_is_not_there(case, refused, damaged):
    shard = sorted(damaged.glob("*.safetensors"))[1]
    shard.unlink()
    contains(refused(case(damaged)), shard.name, "model.safetensors.index.json", "finish the download")


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_shard(case, refused, damaged, length):
    shard = sorted(damaged.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:length])
    contains(refused(case(damaged)), shard.name, "expected", "again")


def test_a_tensor_that_the_checkpoint_lacks(case, refused, damaged):
    index = damaged / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(content))
    contains(refused(case(damaged)), "model.layers.1.mlp.up_proj.weight", "complete")


def test_a_config_json_that_is_not_json(case, refused, damaged):
    (damaged / "config.json").write_text("{")
    contains(refused(case(damaged)), "config.json", "model.path")


class Trap:
    """An object that leaves a file where it's unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("legacy", [False, True], ids=["torch.save", "a bare pickle"])
def test_a_bin_file_with_more_in_it_than_tensors_is_not_executed(case, refused, damaged, tmp_path, legacy):
    content = {"weight": torch.zeros(2), "trap": Trap(tmp_path / "sprung")}
    for file in damaged.glob("*.safetensors*"):
        file.unlink()
    with (damaged / "pytorch_model.bin").open("wb") as file:
        pickle.dump(content, file) if legacy else torch.save(content, file)
    contains(refused(case(damaged)), "pytorch_model.bin")
    assert not (tmp_path / "sprung").exists()


def test_an_architecture_without_an_adapter_says_what_to_do(case, refused, damaged):
    MambaConfig(num_hidden_layers=2, hidden_size=8).save_pretrained(damaged)
    made = case(damaged, model={"type": "Llama"})  # auto would explore it
    contains(refused(made), "'mamba'", "llama", "ADAPTERS in llmc/models/registry.py")


def test_an_architecture_that_hands_more_between_blocks_than_the_hidden_state(case, refused, damaged):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    own = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1, "altup_num_inputs": 2, "laurel_rank": 4}
    kinds = {"layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 2}
    Gemma3nTextConfig(**sizes, **own, **kinds, intermediate_size=48, head_dim=8).save_pretrained(damaged)
    contains(refused(case(damaged)), "can't be compressed block by block", "4 dimensions")


def test_a_checkpoint_that_is_quantized_already(case, refused, damaged):
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (damaged / "config.json").write_text(json.dumps(config))
    contains(refused(case(damaged)), "already quantized (gptq)", "original")


def test_a_checkpoint_that_llmc_wrote_is_quantized_already(case, refused):
    symmetric = {"bit": 4, "symmetric": True, "granularity": "per_group", "group_size": 32}
    first = case(quant={"weight": symmetric}, save={"save_vllm": False, "save_autogptq": True})
    assert main(first.arguments) == 0
    contains(refused(case(first.save_path / "autogptq_quant_model")), "already quantized (gptq)", "original")


def test_a_missing_tokenizer(case, refused, damaged):
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    contains(refused(case(damaged)), "tokenizer", str(damaged))


def test_a_tokenizer_with_more_tokens_than_the_model(case, refused, damaged):
    tokenizer = json.loads((damaged / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"w{index}": 10**6 + index for index in range(100)}
    (damaged / "tokenizer.json").write_text(json.dumps(tokenizer))
    contains(refused(case(damaged)), "tokenizer", "208")


# --- a weight that isn't finite: found when its block is read --------------------------------------------------------


def poison(folder: Path, name: str, value: float) -> Callable[[], None]:
    """Write a value into a stored tensor; returns what repairs it."""
    entry = read_headers(folder)[name]

    def put(raw: bytes) -> bytes:
        with entry.file.open("r+b") as file:
            file.seek(entry.offset + 4)
            before = file.read(len(raw))
            file.seek(entry.offset + 4)
            file.write(raw)
        return before

    kept = put(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes())
    return lambda: put(kept) and None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite_is_named_and_the_run_goes_on_when_it_is_repaired(
    case, damaged, capsys, name, value
):
    repair = poison(damaged, name, value)
    run, calm = case(damaged, "GPTQ", base={"checkpoint_every": 1}), case(method="GPTQ")
    assert main(run.arguments) == 2
    message = capsys.readouterr().err
    contains(message, f"{name}: 1 of", "NaN or infinite", "run the same command")
    assert not list(run.save_path.rglob("config.json"))
    repair()
    assert main(run.arguments) == 0
    assert ("resuming" in capsys.readouterr().out) == ("embed" not in name)
    assert main(calm.arguments) == 0
    assert run.written() == calm.written()


# --- the text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("section", ["calib", "eval"])
def test_an_empty_text(case, refused, tmp_path, section, content):
    (tmp_path / "empty.txt").write_text(content)
    changed = case(method="GPTQ", **{section: {"path": str(tmp_path / "empty.txt")}})
    contains(refused(changed), "empty.txt")


def test_a_calibration_text_that_is_too_short_says_how_much_there_is(case, refused):
    contains(refused(case(method="GPTQ"), "calib.n_samples=26"), "calib.txt", "26 samples of 16", "400 tokens")


def test_an_evaluation_text_that_is_too_short_says_how_much_there_is(case, refused):
    contains(refused(case(), "eval.seq_len=78"), "eval.txt", "77 tokens", "eval.seq_len")


@pytest.mark.parametrize("section", ["calib", "eval"])
def test_a_text_file_that_is_not_there(case, refused, tmp_path, section):
    contains(refused(case(method="GPTQ", **{section: {"path": str(tmp_path / "no.txt")}})), "no.txt", "path")


# --- the output folder ---------------------------------------------------------------------------------------------


def test_not_enough_disk(case, refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
    contains(refused(case()), "not enough disk", "out-0", "GB", "save.save_path")


def test_a_resumed_run_does_not_ask_for_the_disk_that_it_has_taken(case, damaged, monkeypatch):
    repair = poison(damaged, "lm_head.weight", float("nan"))
    run = case(damaged)
    assert main(run.arguments) == 2
    repair()
    prepared = prepare(load_config(run.content, (), options_types()))
    taken = sum(file.stat().st_size for file in run.save_path.rglob("*") if file.is_file())
    assert taken > 100_000
    monkeypatch.setattr("llmc.run.free_disk", lambda path: prepared.estimate.disk - taken)
    assert main(run.arguments) == 0


@pytest.mark.parametrize("existing", [None, "resume", "overwrite", "fail"])
def test_a_folder_that_holds_something_else(case, refused, existing):
    run = case(save={"on_existing": existing})
    run.save_path.mkdir()
    (run.save_path / "thesis.txt").write_text("years of work")
    contains(refused(run), "save.save_path", str(run.save_path), "folder")


def test_a_folder_with_a_finished_run(case, refused):
    run = case()
    assert main(run.arguments) == 0
    contains(refused(run), "save.save_path", "a finished run", "save.on_existing=overwrite")
    assert main([*run.arguments, "--set", "save.on_existing=overwrite"]) == 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("quant.weight.bit=8", "quant.weight.bit"),
        ("calib.n_samples=3", "calib.n_samples"),
        ("eval.seq_len=20", "eval"),
        ("base.seed=1", "base.seed"),
    ],
)
def test_a_folder_with_an_unfinished_run_of_another_configuration_names_what_differs(
    case, refused, damaged, override, said
):
    repair = poison(damaged, "model.layers.2.mlp.up_proj.weight", float("nan"))
    run = case(damaged, "GPTQ", quant={"weight": {"bit": 4, "symmetric": True, "granularity": "per_channel"}})
    assert main(run.arguments) == 2
    repair()
    contains(refused(run, override), "save.save_path", "unfinished run", "another configuration", said)


def test_a_folder_with_an_unfinished_run_of_another_text_or_checkpoint_names_what_differs(
    case, refused, damaged, source_of, tmp_path
):
    poison(damaged, "model.layers.2.mlp.up_proj.weight", float("nan"))
    text = tmp_path / "calib.txt"
    text.write_text(words(400, seed=1))
    run = case(damaged, "GPTQ", calib={"path": str(text)})
    assert main(run.arguments) == 2
    text.write_text(words(400, seed=5))
    contains(refused(run), "unfinished run with another calibration text\n")
    text.write_text(words(400, seed=1))
    shutil.rmtree(damaged)
    shutil.copytree(source_of("llama-tied"), damaged)
    contains(refused(run), "unfinished run with another checkpoint\n")


def test_a_run_goes_on_with_other_tuning_in_a_moved_folder(case, damaged):
    repair = poison(damaged, "model.layers.2.mlp.up_proj.weight", float("nan"))
    run, calm = case(damaged, "GPTQ"), case(method="GPTQ")
    assert main(run.arguments) == 2
    repair()
    moved = replace(run, save_path=run.save_path.with_name("moved"))
    run.save_path.rename(moved.save_path)
    moved.content["save"]["save_path"] = str(moved.save_path)
    assert main([*moved.arguments, "--set", "base.forward=replay", "--set", "base.checkpoint_every=1"]) == 0
    assert main(calm.arguments) == 0
    assert moved.written() == calm.written()


def test_a_save_path_that_is_a_file(case, refused):
    run = case()
    run.save_path.write_text("something")
    contains(refused(run), "save.save_path", "is a file", "folder")


def test_a_save_path_below_a_file(case, refused, tmp_path):
    (tmp_path / "file").write_text("something")
    below = tmp_path / "file" / "out"
    contains(refused(case(), f"save.save_path={below}"), "save.save_path", str(below), "Not a directory")


def test_a_save_path_that_cannot_be_written(case, refused, monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(workspace.Path, "mkdir", refuse)
    contains(refused(case()), "save.save_path", "out-0", "Permission denied")
