"""Bad input ends with code 2 and one message that says what, where and what to do; nothing is written or read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, files_of, words
from safetensors.torch import load_file
from transformers import Gemma3nTextConfig, MambaConfig

from llmc import workspace
from llmc.algorithms import options_types
from llmc.cli import main
from llmc.config import load_config
from llmc.prepare import prepare
from llmc.stream.headers import read_headers
from llmc.stream.source import BlockSource

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted checkpoints are kept where the test ends."""
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a case that must be refused before a weight is read, and returns the message."""

    def run(case: Case, *overrides: str) -> str:
        capsys.readouterr()
        files = {folder: files_of(folder) for folder in (case.source, case.save_path) if folder.is_dir()}
        existed = case.save_path.exists()
        with monkeypatch.context() as patch:
            for name in ("prefetch", "take", "_read"):
                patch.setattr(BlockSource, name, lambda self, unit: pytest.fail(f"{unit} is read"))
            code = main([*case.arguments, *(part for text in overrides for part in ("--set", text))])
        message = capsys.readouterr().err
        assert code == 2, message
        assert message.count("error: ") == 1
        assert "\n  -> " in message  # the remedy
        assert "Traceback" not in message
        assert case.save_path.exists() == existed
        assert files == {folder: files_of(folder) for folder in files}
        return message

    return run


def contains(message: str, *parts: str) -> None:
    assert [part for part in parts if part not in message] == [], message


# --- the configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("quant.wieght.bit=4", ["quant.wieght", "did you mean 'weight'"]),
        ("quant.method=GTPQ", ["quant.method", "'GTPQ'", "did you mean 'GPTQ'"]),
        ("quant.method=TesseraQ", ["quant.method", "'TesseraQ' isn't available", "GPTQ"]),
        ("quant.weight.symmetric=4", ["quant.weight.symmetric", "4"]),
        ("quant.weight.bit=17", ["quant.weight.bit", "17 is not in 2..16"]),
        ("quant.weight.group_size=0", ["quant.weight.group_size", "above 0"]),
        ("calib.n_samples=-1", ["calib.n_samples", "-1"]),
        ("quant.method=[RTN, GPTQ]", ["quant.method", "RTN and GPTQ", "['RTN']"]),
        ("quant.method=[GPTQ, Awq]", ["quant.method", "GPTQ must come last", "['Awq', 'GPTQ']"]),
        (
            "quant.act={bit: 8, symmetric: true, granularity: per_head, head_num: 2}",
            ["quant.act.granularity: per_head"],
        ),
        ("quant.act={bit: e4m7, symmetric: true, granularity: per_token}", ["quant.act.bit: e4m7", "not available"]),
        ("quant.act={bit: e4m3, symmetric: false, granularity: per_token}", ["quant.act.symmetric", "no zero point"]),
        ("quant.act={bit: nvfp4, group_size: 32}", ["quant.act.group_size", "nvfp4 has groups of 16"]),
        ("quant.act={bit: 8, symmetric: true, granularity: per_token, static: true}", ["quant.act.gran", "per_tensor"]),
        ("quant.weight={bit: e2m1, symmetric: true, granularity: per_block}", ["quant.weight.block_size", "missing"]),
        ("save.trtllm_cfg={tp_size: 2, pp_size: 1}", ["save.trtllm_cfg", "trtllm-serve --tp_size"]),
        ("save.save_trtllm=true", ["TensorRT-LLM has no method for W4 g32 asym", "save_trtllm", "group_size: 128"]),
        ("quant.act={bit: 8, symmetric: true, granularity: per_token}", ["W4 g32 asym, A8 token sym", "symmetric"]),
        ("save.save_mlcllm=true", ["save_mlcllm", "each group of 128", "group_size: 128"]),
        ("save.save_autogptq=true", ["save_autogptq", "refuse zero points", "save_autoawq"]),
        ("base.device=cuda:99", ["base.device", "cuda:99", "cpu"]),
        ("ignored_layers={layer_names: [w_proj]}", ["ignored_layers", "matches no layer", "--dry-run"]),
        ("model.type=Opt", ["model.type", "'Opt'", "'llama'", "'Llama'"]),
        ("model.type=Lama", ["model.type", "Lama", "did you mean 'Llama'"]),
        ("save.save_path=null", ["save.save_path", "missing"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_configuration(case, refused, override, said):
    contains(refused(case(), override), *said)


def test_float16_is_too_narrow_to_learn_in(case, refused):
    contains(refused(case(method="OmniQuant"), "model.torch_dtype=torch.float16"), "model.torch_dtype", "bfloat16")


def test_learned_ranges_are_for_those_who_learn(case, refused):
    contains(refused(case(method="Awq"), "quant.weight.calib_algo=learnable"), "quant.weight.calib_algo: learnable")


@pytest.mark.parametrize("method", ["GPTQ", "Awq", "OmniQuant"])
def test_calibration_text_is_missing_for_a_method_that_needs_it(case, refused, method):
    contains(refused(case(method=method), "calib=null"), "calib", method)


@pytest.mark.parametrize(
    "act", ["{bit: 8, symmetric: true, granularity: per_tensor, static: true}", "{bit: nvfp4}"], ids=["static", "nvfp4"]
)
def test_calibration_text_is_missing_for_ranges_of_activations(case, refused, act):
    contains(refused(case(save={"save_vllm": False}), "calib=null", f"quant.act={act}"), "quant.act (A", "calib")


@pytest.mark.parametrize("act", ["{bit: 8, symmetric: true, granularity: per_group, group_size: 48}"])
def test_groups_of_activations_that_divide_no_layer(case, refused, act):
    message = refused(case(save={"save_vllm": False}), f"quant.act={act}")
    contains(message, "quant.act.group_size: 48", "64 input channels of model.layers.0.self_attn.q_proj", "32, 64")
    contains(message, "per_token", "ignored_layers")


def test_a_group_size_that_divides_no_layer_names_the_layer_and_the_sizes_that_would(case, refused):
    message = refused(case(), "quant.weight.group_size=48")
    contains(message, "group_size: 48", "64 input channels of model.layers.0.self_attn.q_proj", "32, 64")


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ("{bit: 4, symmetric: false, granularity: per_group, group_size: 16}", ["groups of 16", "32, 64, 128"]),
        ("{bit: 8, symmetric: false, granularity: per_channel}", ["8-bit weights with zero points", "symmetric: true"]),
        ("{bit: 4, symmetric: true, granularity: per_tensor}", ["one scale per tensor", "per_channel"]),
    ],
    ids=["group 16", "asymmetric 8 bits", "per tensor"],
)
def test_a_scheme_that_vllm_cannot_load(case, refused, weight, said):
    contains(refused(case(), f"quant.weight={weight}"), "vLLM", "save_vllm", "save_fake", "Transformers", *said)


INT8 = "{bit: 8, symmetric: true, granularity: per_channel}"
FP8 = "{bit: e4m3, symmetric: true, granularity: per_channel}"


@pytest.mark.parametrize(
    ("weight", "act", "said"),
    [
        ("{bit: 4, symmetric: true, granularity: per_channel}", "{bit: 4, symmetric: true, granularity: per_token}",
         ["W4 channel sym, A4 token sym", "bit: 8", "leave out quant.act"]),
        ("{bit: 6, symmetric: true, granularity: per_channel}", "{bit: 6, symmetric: true, granularity: per_token}",
         ["W6 channel sym, A6 token sym", "bit: 8"]),
        ("{bit: 8, symmetric: false, granularity: per_channel}", "{bit: 8, symmetric: true, granularity: per_token}",
         ["W8 channel asym", "symmetric weights"]),
        ("{bit: 8, symmetric: true, granularity: per_group, group_size: 32}",
         "{bit: 8, symmetric: true, granularity: per_token}", ["W8 g32 sym", "per_channel"]),
        (INT8, "{bit: 8, symmetric: true, granularity: per_tensor}", ["A8 tensor sym", "one scale per token"]),
        (INT8, "{bit: e4m3, symmetric: true, granularity: per_token}", ["A8 e4m3 token", "bit: e4m3"]),
        (FP8, "{bit: e5m2, symmetric: true, granularity: per_token}", ["A8 e5m2 token", "bit: e4m3"]),
        (FP8, "{bit: e4m3, symmetric: true, granularity: per_group, group_size: 32}", ["A8 e4m3 g32", "per token"]),
        ("{bit: mxfp8}", "null", ["W8 mxfp8", "act {bit: mxfp8}"]),
        ("{bit: nvfp4}", "{bit: mxfp4}", ["W4 nvfp4, A4 mxfp4", "act {bit: nvfp4}"]),
    ],
)  # fmt: skip
def test_activations_that_vllm_cannot_load(case, refused, weight, act, said):
    message = refused(case(), f"quant.weight={weight}", f"quant.act={act}")
    contains(message, "vLLM has no kernel", "save_vllm", "nearest", "save_fake", *said)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ("{bit: 4, symmetric: true, granularity: per_channel, scale_dtype: float32}", ["16 bits", "scale_dtype"]),
        ("{bit: 8, symmetric: true, granularity: per_channel, scale_dtype: bfloat16}", ["float32", "scale_dtype"]),
    ],
    ids=["wide scales", "narrow scales"],
)
def test_scales_that_vllm_would_round_again(case, refused, weight, said):
    act = "{bit: 8, symmetric: true, granularity: per_token}"
    contains(refused(case(), f"quant.weight={weight}", f"quant.act={act}"), "vLLM", "save_vllm", *said)


def test_linears_that_vllm_fuses_must_be_ignored_together(case, refused):
    message = refused(case(), "ignored_layers={layer_names: [self_attn.q_proj]}")
    contains(message, "vLLM fuses", "q_proj", "k_proj", "ignored_layers")


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


# --- a process of its own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [(["quant.weight.bit=17"], "17 is not in 2..16"), (["quant.weight.group_size=48"], "doesn't divide")],
)
def test_the_exit_code_of_the_process(case, overrides, said):
    run = case()
    command = [sys.executable, "-m", "llmc", *run.arguments, "--set", *overrides]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    contains(ended.stderr, said)
    assert not run.save_path.exists()


def test_everything_that_a_finished_run_leaves_can_be_loaded(case):
    run = case(method="GPTQ")
    assert main(run.arguments) == 0
    files = {"metrics.json", "report.html", "surfaces.safetensors"}
    assert {path.name for path in run.save_path.iterdir()} == {*files, "vllm_quant_model", "fake_quant_model"}
    assert load_file(run.save_path / "surfaces.safetensors")
    for folder in ("vllm_quant_model", "fake_quant_model"):
        assert all(load_file(file) for file in (run.save_path / folder).glob("*.safetensors"))
