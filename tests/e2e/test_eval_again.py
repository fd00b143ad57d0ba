"""``llmc eval``: a finished run measured from what it wrote gives the numbers of the run, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, files_of, reload

from llmc.cli import main
from llmc.errors import RunError
from llmc.evaluating import Evaluable, stream_logits
from llmc.finished import open_finished, prepare_again, read_metrics
from llmc.stream import head

ONE = {"save_vllm": False, "save_fake": True}
W8 = {"bit": 8, "symmetric": True, "granularity": "per_channel"}
STATIC = {"weight": W8, "act": {"bit": 8, "symmetric": False, "granularity": "per_tensor", "static": True}}
A8 = {"bit": 8, "symmetric": True, "granularity": "per_token"}
ONLINE = {"special": {"Quarot": {"online_rotate": True}}, "weight": W8, "act": A8}
INT4_CACHE = {"method": "Naive", "bit": 4, "symmetric": False, "granularity": "per_token"}
FP8_CACHE = {"method": "Naive", "bit": "e4m3", "symmetric": True, "granularity": "per_tensor", "static": True}
CACHED = ["fake_quant", "fake_quant_wo_kv"]
DROPPED = {"method": "ShortGPT", "weight": {"n_prune_layers": 1}}
RECIPES: dict[str, tuple[str, Any, list[str], dict[str, Any]]] = {
    "W4": ("llama", "GPTQ", ["pretrain", "transformed", "fake_quant"], {"save": {"save_trans": True}}),
    "W8A8-static": ("qwen2", "RTN", ["fake_quant"], {"quant": STATIC, "save": {"save_fake": False}}),
    "rotated": ("llama-tied", ["Quarot", "RTN"], ["fake_quant"], {"quant": ONLINE, "save": {"save_fake": False}}),
    "cache": ("llama", "RTN", CACHED, {"quant": {"kvcache": INT4_CACHE}, "save": ONE}),
    "static-cache": ("llama", "RTN", CACHED, {"quant": {"kvcache": FP8_CACHE}, "save": {"save_fake": False}}),
    "dropped": ("qwen3", "RTN", ["pretrain", "fake_quant"], {"sparse": DROPPED, "save": ONE}),
    "pruned": ("opt", "Wanda", ["fake_quant"], {"save": ONE}),
}


def everything(run: Case, positions: list[str], *, decoding: bool = False) -> Case:
    """All that is measured of a text, at all positions."""
    text = {**run.content["eval"], "eval_pos": positions}
    run.content["eval"] = [{**text, "type": ["ppl", "token_acc"], "bs": 2}]
    run.content["eval"] += [{**text, "type": "decode_ppl", "num_eval_tokens": 8, "num_chunks": 1}] * decoding
    return run


def forget(run: Case) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The evaluations in the run's ``metrics.json``, which are taken out of it, and what is left."""
    file = run.save_path / "metrics.json"
    metrics = json.loads(file.read_text())
    found = metrics.pop("evaluation")
    file.write_text(json.dumps({**metrics, "evaluation": []}))
    return found, metrics


def numbers(run: Case) -> list[dict[str, Any]]:
    return json.loads((run.save_path / "metrics.json").read_text())["evaluation"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_are_those_of_the_run(case, source_of, capsys, name):
    family, method, positions, changes = RECIPES[name]
    if method == "Wanda":
        changes = {**changes, "quant": None, "sparse": {"method": "Wanda", "weight": {"sparsity": 0.5}}}
    run = everything(case(source_of(family), method, **changes), positions, decoding="cache" in name)
    assert main(run.arguments) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("EVAL: ")]
    expected, rest = forget(run)
    compared = [one for one in positions if one != "pretrain"]
    kinds = [*(("ppl", one) for one in positions), *(("token_acc", one) for one in compared)]
    kinds += [("decode_ppl", one) for one in positions if "cache" in name]
    assert [(one["kind"], one["position"]) for one in expected] == kinds
    assert main(["eval", *run.arguments]) == 0
    assert numbers(run) == expected
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("EVAL: ")] == said
    metrics = json.loads((run.save_path / "metrics.json").read_text())
    del metrics["evaluation"]
    assert metrics == rest


def test_what_was_never_evaluated_is_added_and_replaces_its_like(case, tmp_path, texts):
    run, calm = case(save=ONE, eval={"eval_pos": []}), everything(case(save=ONE), ["fake_quant"])
    run.compress()
    calm.compress()
    own = Path(shutil.copy(texts["eval"], tmp_path / "own.txt"))
    everything(run, ["fake_quant"]).content["eval"][0] |= {"name": "text", "path": str(own)}
    assert main(["eval", *run.arguments, "--no-write"]) == 0
    assert numbers(run) == []
    assert main(["eval", *run.arguments]) == 0
    first = numbers(run)
    values = [[one["value"] for one in found] for found in (first, numbers(calm))]
    assert values[0] == values[1]
    assert [one["kind"] for one in first] == ["ppl", "token_acc"]
    assert all("own.txt" in one["protocol"] for one in first)
    assert main(["eval", *run.arguments, "--set", "eval.0.num_chunks=2"]) == 0  # another protocol beside it
    more = numbers(run)
    assert more[:2] == first
    assert [one["windows"] for one in more] == [3, 3, 2, 2]
    assert main(["eval", *run.arguments]) == 0  # the same again takes its place
    assert numbers(run) == [*more[2:], *first]


def test_a_run_elsewhere_and_a_scheme_that_is_not_the_runs(case, capsys, tmp_path):
    run = case(save=ONE)
    run.compress()
    expected, _ = forget(run)
    moved = Path(shutil.move(run.save_path, tmp_path / "moved"))
    capsys.readouterr()
    assert main(["eval", *run.arguments, "--from", str(moved), "--set", "quant.weight.bit=3"]) == 0
    said = capsys.readouterr().out
    assert "quant: not the run's, and without effect" in said
    assert json.loads((moved / "metrics.json").read_text())["evaluation"] == expected


def test_a_model_as_it_came(case, capsys):
    run = case(eval={"eval_pos": ["pretrain"]}, quant=None, save=None)
    expected = run.compress().perplexities[0].value
    assert main(["eval", *run.arguments]) == 0
    assert f"EVAL: ppl on text is {expected:.4f} (pretrain: " in capsys.readouterr().out
    assert not run.save_path.exists()


def test_what_cannot_be_measured_is_refused_with_the_reason(case, capsys, monkeypatch):
    run = case(save=ONE)
    assert refused(run, capsys, "has no metrics.json")
    run.compress()
    file = run.save_path / "metrics.json"
    good = file.read_text()
    before = files_of(run.save_path)
    assert refused(run, capsys, "eval_pos: transformed: the run kept no weights", "--set", "eval.eval_pos=transformed")
    short = ("--set", "eval.seq_len=5000")
    assert refused(run, capsys, "less than one window of 5000", *short)
    assert refused(run, capsys, "nothing is to be evaluated", "--set", "eval.eval_pos=[]")
    assert refused(run, capsys, "only pretrain", "--set", "eval.type=token_acc", "--set", "eval.eval_pos=[pretrain]")
    assert refused(run, capsys, "save.save_path: missing", "--set", "save=null")
    assert files_of(run.save_path) == before
    file.write_text(good.replace('"schema": 2', '"schema": 7', 1))
    assert refused(run, capsys, "metrics.json has schema 7, and this version of llmc reads 1 and 2")
    file.write_text(good.replace('"schema": 2', '"schema": 1', 1))
    assert main(["eval", *run.arguments]) == 0
    assert json.loads(file.read_text())["schema"] == 2
    shutil.rmtree(run.save_path / "fake_quant_model")
    assert refused(run, capsys, "holds no weights that can be read back, only save_fake")
    (run.save_path / ".llmc").mkdir()
    (run.save_path / ".llmc" / "fingerprint.json").write_text("{}")
    assert refused(run, capsys, "holds a run that isn't finished")


def refused(run: Case, capsys: Any, said: str, *further: str) -> bool:
    capsys.readouterr()
    return main(["eval", *run.arguments, *further]) == 2 and said in capsys.readouterr().err


def opened(run: Case) -> Evaluable:
    metrics = read_metrics(run.save_path)
    return open_finished(run.save_path, metrics, prepare_again(metrics))


@torch.no_grad()
def test_logits_of_any_batches_are_those_of_the_whole_model(case, source_of, monkeypatch):
    """Of several lengths, padded on the right; of the original and of what was written."""
    run = case(source_of("llama-tied"), ["Quarot", "RTN"], save=ONE, eval={"eval_pos": []})
    run.compress()
    monkeypatch.setattr(head, "_HEAD_TOKENS", 5)
    sequences = [torch.arange(3, 3 + count) for count in (7, 11, 6)]
    padded = torch.nn.utils.rnn.pad_sequence(sequences[:2], batch_first=True)
    batches, done = [padded, sequences[2][None]], opened(run)
    for state, folder in (("pretrain", run.source), ("fake_quant", run.save_path / "fake_quant_model")):
        seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}

        def visit(batch: int, start: int, logits: torch.Tensor, seen: Any = seen) -> None:
            assert start == sum(part.shape[1] for part in seen[batch])
            seen[batch].append(logits)

        stream_logits(done, state, batches, visit)
        found = [torch.cat(seen[0], 1)[0, :7], torch.cat(seen[0], 1)[1], torch.cat(seen[1], 1)[0]]
        model = reload(folder)
        for sequence, logits in zip(sequences, found, strict=True):
            torch.testing.assert_close(logits, model(input_ids=sequence[None]).logits[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(RunError, match="eval_pos: transformed"):
        stream_logits(done, "transformed", batches, lambda *seen: None)
    with pytest.raises(ValueError, match="quantized is no state"):
        stream_logits(done, "quantized", batches, lambda *seen: None)
    original = Evaluable.original(done.prepared)
    with pytest.raises(RunError, match="there is no compressed model"):
        stream_logits(original, "fake_quant", batches, lambda *seen: None)
