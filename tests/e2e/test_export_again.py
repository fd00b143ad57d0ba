"""Formats made from a finished run are, byte for byte, those that the run would have written itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cases import files_of
from safetensors.torch import load_file

import llmc.exporting
from llmc.cli import main
from llmc.export import EXPORTERS
from llmc.export.dense import FakeQuant
from llmc.export.vllm import VLLM
from llmc.stream.sink import Sink

VLLM_FOLDER, FAKE, TRANS = "vllm_quant_model", "fake_quant_model", "transformed_model"
W8 = {"bit": 8, "symmetric": True, "granularity": "per_channel"}
STATIC = {"weight": W8, "act": {"bit": 8, "symmetric": False, "granularity": "per_tensor", "static": True}}
FP8_CACHE = {"method": "Naive", "bit": "e4m3", "symmetric": True, "granularity": "per_tensor", "static": True}
MIXED = {
    "weight": W8,
    "mix_bits": {"down": {"layer_name": ["down_proj"], "do_quant": True, "weight": {**W8, "bit": 4}}},
}
QUIET = {"eval_pos": []}


class Copy(VLLM):
    """The same as vLLM's, under another name: what a format needs of a record that stores ranges and cache scales."""

    name = "save_sgl"
    folder = "sgl_quant_model"


class Halves(FakeQuant):
    """A format of float16 scales."""

    name = "save_autoawq"
    folder = "autoawq_quant_model"
    scale_dtype = torch.float16


@pytest.fixture
def formats(monkeypatch):
    """More formats than there are."""

    def add(*kinds):
        for module in ("llmc.exporting", "llmc.translate"):
            monkeypatch.setattr(f"{module}.EXPORTERS", (*EXPORTERS, *kinds))

    return add


def export(run: Path, *targets: str, model: Path | None = None) -> int:
    further = [] if model is None else ["--model", str(model)]
    return main(["export", "--from", str(run), "--to", *targets, *further])


@pytest.mark.parametrize(
    ("family", "method", "changes"),
    [
        ("llama", "GPTQ", {}),
        ("llama-tied", "Awq", {}),
        ("opt", "RTN", {}),
        ("llama-tied", ["Quarot", "GPTQ"], {}),
        ("llama", "RTN", {"quant": STATIC}),
        ("llama", "RTN", {"quant": MIXED}),
        ("qwen3", "RTN", {"sparse": {"method": "ShortGPT", "weight": {"n_prune_layers": 1}}}),
        ("llama", "RTN", {"ignored_layers": {"layer_names": ["mlp.down_proj"], "block_ids": [1]}}),
    ],
)
def test_the_fake_quantized_folder_is_the_one_that_the_run_writes(case, source_of, family, method, changes):
    both = case(source_of(family), method, eval=QUIET, **changes)
    one = case(source_of(family), method, eval=QUIET, save={"save_fake": False}, **changes)
    both.compress()
    one.compress()
    assert not (one.save_path / FAKE).exists()
    assert export(one.save_path, "fake") == 0
    written = files_of(one.save_path / FAKE)
    assert written == files_of(both.save_path / FAKE)
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} < written.keys()
    outputs = [json.loads((run.save_path / "metrics.json").read_text())["outputs"] for run in (one, both)]
    assert outputs[0].keys() == outputs[1].keys() == {"save_vllm", "save_fake"}
    for key in ("bytes", "bits_per_weight", "tensors"):
        assert outputs[0]["save_fake"][key] == outputs[1]["save_fake"][key]


@pytest.mark.parametrize("quant", [STATIC, {"kvcache": FP8_CACHE}], ids=["inputs", "cache"])
def test_static_ranges_are_carried_over(case, formats, quant):
    formats(Copy)
    run = case(quant=quant, save={"save_fake": False}, eval=QUIET)
    run.compress()
    assert export(run.save_path, "sgl") == 0
    made = files_of(run.save_path / Copy.folder)
    assert made == files_of(run.save_path / VLLM_FOLDER)
    names = {name for file in (run.save_path / Copy.folder).glob("*.safetensors") for name in load_file(file)}
    assert any(name.endswith((".input_scale", ".k_scale")) for name in names)


def test_scales_that_another_dtype_holds_exactly_are_taken_over_with_a_note(case, formats, capsys):
    formats(Halves)
    run = case(eval=QUIET)
    run.compress()
    assert export(run.save_path, "autoawq") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "save_autoawq: the codes and scales are the run's" in said
    assert "evaluated in bfloat16, are rounded to float16" in said
    weights = [
        {
            name: tensor
            for file in (run.save_path / folder).glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for folder in (Halves.folder, FAKE)
    ]
    name = "model.layers.1.mlp.up_proj.weight"
    assert weights[0][name].dtype == torch.float16
    made, evaluated = (tensors[name].float() for tensors in weights)  # the same products, rounded more finely
    assert not torch.equal(made, evaluated)
    assert bool(((made - evaluated).abs() <= 2**-8 * evaluated.abs()).all())


def test_scales_that_another_dtype_rounds_are_refused_before_anything_is_written(case, formats, capsys):
    formats(Halves)
    run = case(eval=QUIET, quant={"weight": {**W8, "bit": 4, "scale_dtype": "float32"}}, save={"save_vllm": True})
    run.compress()
    before = files_of(run.save_path)
    assert export(run.save_path, "autoawq") == 2
    said = capsys.readouterr().err
    assert ".down_proj: save_autoawq stores scales in float16, which has no " in said
    assert "quant.weight.scale_dtype: float16" in said
    assert files_of(run.save_path) == before


def test_several_formats_at_once_are_written_beside_the_others(case):
    run = case(eval=QUIET, save={"save_vllm": True, "save_fake": False}, quant={"weight": None, "kvcache": FP8_CACHE})
    run.compress()
    assert export(run.save_path, "save_fake", "trans", "fake") == 0  # nothing is rounded, so both are the original
    assert files_of(run.save_path / FAKE) == files_of(run.save_path / TRANS)


@pytest.mark.parametrize(
    ("save", "target", "said"),
    [
        ({"save_vllm": False}, "vllm", "holds no codes and scales, only save_fake"),
        ({}, "fake", "fake_quant_model is there already"),
        ({}, "trans", "save_trans holds weights before they are rounded"),
        ({}, "vlm", "there is no such format; did you mean 'vllm'?"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(case, capsys, save, target, said):
    run = case(eval=QUIET, save=save)
    run.compress()
    before = files_of(run.save_path)
    assert export(run.save_path, target) == 2
    assert said in capsys.readouterr().err
    assert files_of(run.save_path) == before


def test_a_scheme_that_the_backend_cannot_load_is_refused_by_its_own_check(case, capsys):
    run = case(eval=QUIET, quant={"weight": {**W8, "bit": 3}}, save={"save_vllm": True, "save_fake": False})
    run.compress()
    assert export(run.save_path, "sgl") == 2
    assert "SGLang doesn't run W3 channel sym" in capsys.readouterr().err
    assert not (run.save_path / "sgl_quant_model").exists()
    assert export(run.save_path, "fake") == 0


def test_an_unfinished_run_and_no_run_at_all_are_refused(case, tmp_path, capsys, monkeypatch):
    assert export(tmp_path, "fake") == 2
    assert "--from takes the save_path of a finished run" in capsys.readouterr().err
    for content in ("{", "[]", '{"schema": 1, "config": {}}'):
        (tmp_path / "metrics.json").write_text(content)
        assert export(tmp_path, "fake") == 2
        assert "metrics.json " in capsys.readouterr().err
    run = case(eval=QUIET, save={"save_fake": False})
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "write_index", lambda self, rows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.compress()
    assert export(run.save_path, "fake") == 2
    assert "isn't finished" in capsys.readouterr().err


def test_an_export_killed_in_between_never_looks_finished_and_is_begun_anew(case, monkeypatch):
    run = case(eval=QUIET, save={"save_fake": False})
    run.compress()
    before = files_of(run.save_path)
    write, count = Sink.write, iter(range(10))

    def dying(self, unit, record):
        if next(count) == 3:
            raise KeyboardInterrupt
        return write(self, unit, record)

    with monkeypatch.context() as patch:
        patch.setattr(Sink, "write", dying)
        assert export(run.save_path, "fake") == 130
    half = set(files_of(run.save_path)) - set(before)
    assert half
    assert not (run.save_path / FAKE / "config.json").exists()
    assert files_of(run.save_path)["metrics.json"] == before["metrics.json"]
    (run.save_path / FAKE / "stray.safetensors").write_bytes(b"of the first try")
    with monkeypatch.context() as patch:  # killed behind the folder, in front of metrics.json
        patch.setattr(llmc.exporting, "write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert export(run.save_path, "fake") == 130
    assert files_of(run.save_path).keys() > before.keys()
    assert export(run.save_path, "fake") == 0
    written = files_of(run.save_path)
    assert "fake_quant_model/stray.safetensors" not in written
    told = ("metrics.json", "report.html")  # of the new folder
    assert {name: written[name] for name in before if name not in told} == {
        name: digest for name, digest in before.items() if name not in told
    }


def test_a_model_that_has_moved_is_named_and_another_one_is_refused(case, damaged, source_of, tmp_path, capsys):
    run = case(damaged, eval=QUIET, save={"save_fake": False})
    run.compress()
    moved = Path(shutil.move(damaged, tmp_path / "moved"))
    assert export(run.save_path, "fake") == 2
    assert "no such folder" in capsys.readouterr().err
    assert export(run.save_path, "fake", model=source_of("qwen2")) == 2
    assert "name that with --model" in capsys.readouterr().err
    assert export(run.save_path, "fake", model=moved) == 0
    shutil.move(run.save_path, tmp_path / "run-moved")
    assert export(tmp_path / "run-moved", "fake", model=moved) == 2  # it's there already
    assert "is there already" in capsys.readouterr().err


def test_a_damaged_run_is_refused_by_file(case, capsys):
    run = case(eval=QUIET, save={"save_fake": False})
    run.compress()
    shard = run.save_path / VLLM_FOLDER / "model-00004-of-00006.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    assert export(run.save_path, "fake") == 2
    said = capsys.readouterr().err
    assert "model-00004-of-00006.safetensors can't be read" in said
    assert "llmc verify" in said
    assert not (run.save_path / FAKE / "config.json").exists()


def test_the_summary_tells_sizes_bits_and_the_command(case, capsys):
    run = case(eval=QUIET, save={"save_fake": False})
    assert main(run.arguments) == 0
    metrics = json.loads((run.save_path / "metrics.json").read_text())
    shards = list((run.save_path / VLLM_FOLDER).glob("*.safetensors"))
    weights = sum(tensor.numel() for file in run.source.glob("*.safetensors") for tensor in load_file(file).values())
    bits = 8 * sum(file.stat().st_size for file in shards) / weights
    assert metrics["outputs"]["save_vllm"]["bits_per_weight"] == bits
    assert f", {bits:.2f} bits per weight" in capsys.readouterr().out
    assert export(run.save_path, "fake") == 0
    shown = capsys.readouterr().out
    assert "bits per weight" in shown
    assert f"AutoModelForCausalLM.from_pretrained('{run.save_path / FAKE}'" in shown
    assert str(run.save_path / VLLM_FOLDER) in shown


def test_one_shard_is_in_memory_at_a_time(case, monkeypatch):
    import gc

    from llmc.quant import UnitRecord

    run = case(eval=QUIET, save={"save_fake": False})
    run.compress()
    write, alive = Sink.write, []

    def counting(self, unit, record):
        gc.collect()
        alive.append(sum(isinstance(one, UnitRecord) for one in gc.get_objects()))
        return write(self, unit, record)

    monkeypatch.setattr(Sink, "write", counting)
    assert export(run.save_path, "fake") == 0
    assert len(alive) == 6
    assert max(alive) <= min(alive) + 1
