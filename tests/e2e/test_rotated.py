"""Whole runs with rotated models: the float model stays what it was, and what is written loads untied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, files_of, reload
from torch import Tensor
from transformers import AutoTokenizer, CompressedTensorsConfig

from llmc.algorithms import quarot
from llmc.cli import main
from llmc.stream.headers import read_headers

FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "opt"]
TRANS, FAKE, VLLM = "transformed_model", "fake_quant_model", "vllm_quant_model"
EVERYWHERE = ["pretrain", "transformed", "fake_quant"]


@torch.no_grad()
def logits(case: Case, folder: Path, **options: Any) -> Tensor:
    text = Path(case.content["eval"]["path"]).read_text()
    ids = AutoTokenizer.from_pretrained(case.source)(text, add_special_tokens=False)["input_ids"][:40]
    return reload(folder, **options)(input_ids=torch.tensor([ids]), use_cache=False).logits


def relative(left: Tensor, right: Tensor) -> float:
    return ((left - right).abs().max() / right.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotated_model_is_the_original_in_float32(case, exact, family):
    run = case(exact(family), "Quarot", eval={"eval_pos": EVERYWHERE}, save={"save_trans": True})
    result = run.compress()
    measured = {one.position: one.value for one in result.perplexities}
    assert measured["transformed"] == pytest.approx(measured["pretrain"], rel=1e-5)
    assert measured["fake_quant"] != pytest.approx(measured["pretrain"], rel=1e-4)
    assert relative(logits(run, run.save_path / TRANS), logits(run, run.source)) < 1e-5
    dense = CompressedTensorsConfig(dequantize=True)
    fake = logits(run, run.save_path / FAKE)
    assert torch.equal(logits(run, run.save_path / VLLM, quantization_config=dense), fake)
    original = read_headers(run.source)
    for folder in (TRANS, FAKE, VLLM):
        assert json.loads((run.save_path / folder / "config.json").read_text())["tie_word_embeddings"] is False
        written = read_headers(run.save_path / folder)
        assert {"lm_head.weight"} >= {name for name in written if ".weight_" not in name} - original.keys()
        assert written["lm_head.weight"].shape == original[next(n for n in original if "embed_tokens" in n)].shape
    # Errors compare the compressed with the rotated original: against the bare one they would be about 2.
    assert all(0 < block["error"] < 0.5 for block in result.metrics["blocks"])
    assert result.metrics["bytes_read"] == sum(entry.nbytes for entry in original.values())


@pytest.mark.parametrize("family", ["llama-tied", "opt"])
@pytest.mark.parametrize("method", ["RTN", "GPTQ", "Awq"])
def test_the_original_is_evaluated_as_without_a_rotation(case, source_of, family, method):
    plain, rotated = case(source_of(family), method), case(source_of(family), ["Quarot", method])
    expected, found = ({one.position: one.value for one in run.compress().perplexities} for run in (plain, rotated))
    assert found["pretrain"] == expected["pretrain"]
    assert found["fake_quant"] != expected["fake_quant"]


def test_the_random_rotation_preserves_the_model_too(case, exact):
    random = {"special": {"rotate_mode": "random"}}
    runs = [case(exact("llama-tied"), "Quarot", quant=q, save={"save_trans": True}) for q in (random, {})]
    for run in runs:
        run.compress()
        assert relative(logits(run, run.save_path / TRANS), logits(run, run.source)) < 1e-5
    assert runs[0].written() != runs[1].written()


def test_the_seed_of_the_run_is_that_of_the_signs(case):
    runs = [case(method="Quarot", base={"seed": seed}, eval={"eval_pos": []}) for seed in (1, 1, 2)]
    for run in runs:
        run.compress()
    first, again, other = (run.written() for run in runs)
    assert first == again
    shards = {name for name in first if name.endswith(".safetensors")}
    assert {name for name in first if first[name] != other[name]} == shards


def test_a_killed_run_over_a_tied_model_ends_with_the_same_bytes(case, source_of, monkeypatch):
    class Killed(BaseException):
        pass

    def make() -> Case:
        changes = {"base": {"checkpoint_every": 2}, "eval": {"eval_pos": EVERYWHERE}, "save": {"save_trans": True}}
        return case(source_of("llama-tied"), ["Quarot", "GPTQ"], **changes)

    calm = make()
    expected = {one.position: one.value for one in calm.compress().perplexities}
    for fatal in ("embedding", "block", "head"):
        run, seen = make(), iter(range(3))
        real = getattr(quarot.Quarot, fatal)

        def dying(*args: Any, real: Any = real, seen: Any = seen, fatal: str = fatal) -> Any:
            if next(seen, None) == 2 or fatal != "block":
                raise Killed
            return real(*args)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(quarot.Quarot, fatal, dying)
            run.compress()
        found = run.compress()
        assert {one.position: one.value for one in found.perplexities} == expected
        assert run.written() == calm.written(), fatal


@pytest.mark.parametrize(
    ("family", "overrides", "said"),
    [
        ("opt-post-norm", [], ["can't be rotated", "norms stand behind each addition", "method without a rotation"]),
        (
            "llama",
            ["quant.special={Quarot: {online_blocks: true}}"],
            ["quant.special.Quarot", "online_blocks has no use without online_rotate"],
        ),
        ("llama", ["quant.method=[Awq, Quarot]"], ["Quarot must come first", "['Quarot', 'Awq', 'RTN']"]),
        ("llama", ["quant.special={Quarot: {rotate_mode: hadamrd}}"], ["rotate_mode", "hadamard", "random"]),
    ],
)
def test_what_cannot_be_rotated_is_refused_before_a_weight_is_read(case, source_of, capsys, family, overrides, said):
    run = case(source_of(family), ["Quarot", "RTN"])
    arguments = [part for text in overrides for part in ("--set", text)]
    assert main([*run.arguments, *arguments]) == 2
    message = capsys.readouterr().err
    assert [part for part in said if part not in message] == [], message
    assert not run.save_path.exists()
    assert files_of(run.source)


def test_a_width_without_a_hadamard_matrix_is_announced(case, capsys, source_of, monkeypatch):
    monkeypatch.setattr(quarot, "hadamard", lambda size: None if size == 64 else object())
    assert main([*case(method="Quarot").arguments, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "no Hadamard matrix of order 64 (hidden size)" in " ".join((shown.out + shown.err).split())
