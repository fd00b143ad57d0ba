"""Whole runs that prune: the zeros are in the written tensors, what is measured is written, a killed run goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, files_of, reload
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CompressedTensorsConfig

from llmc.algorithms import LayerNote
from llmc.algorithms.rtn import RTN
from llmc.cli import main
from llmc.quant import quantize_weight
from llmc.run import Silent, compress
from llmc.stream.source import BlockSource

PRUNERS = ["Magnitude", "Wanda", "SparseGPT"]
FAKE, TRANS, VLLM = "fake_quant_model", "transformed_model", "vllm_quant_model"
TWO_OF_FOUR = {"sparsity": 0.5, "pattern": "2:4"}


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Assassin(Silent):
    """Ends a run behind a block."""

    fatal: int

    def block(self, index: int, row: Any) -> None:
        if index == self.fatal:
            raise Killed


@pytest.fixture
def pruned(case):
    """Runs that prune and, unless a method is named, don't quantize; the pruned model is saved twice."""

    def make(pruner: str, method: Any = None, weight: Any = None, **changes: Any) -> Case:
        sparse = {"method": pruner, "weight": weight or {"sparsity": 0.5}, **changes.pop("sparse", {})}
        save = {"save_vllm": method is not None, "save_trans": True, **changes.pop("save", {})}
        run = case(method=method or "RTN", sparse=sparse, save=save, **changes)
        if method is None:
            del run.content["quant"]
        return run

    return make


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def is_linear(name: str) -> bool:
    return "_proj.weight" in name


def perplexities(case: Case, *overrides: str) -> dict[str, float]:
    return {one.position: one.value for one in case.compress(*overrides).perplexities}


@torch.no_grad()
def whole_model_perplexity(case: Case, folder: Path, **options: Any) -> float:
    section = case.content["eval"]
    ids = AutoTokenizer.from_pretrained(case.source)(Path(section["path"]).read_text(), add_special_tokens=False)
    size, count = section["seq_len"], section["num_chunks"]
    model, losses = reload(folder, **options), []
    for window in torch.tensor(ids["input_ids"][: size * count]).view(count, size):
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        losses.append(nn.functional.cross_entropy(logits[:-1], window[1:]))
    return exp(float(torch.stack(losses).double().mean()))


def most_zeros_in_a_run(weight: Tensor, of: int) -> tuple[int, int]:
    zeros = (weight.reshape(-1, of) == 0).sum(1)
    return int(zeros.min()), int(zeros.max())


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_the_written_tensors_have_the_zeros_and_all_else_is_untouched(pruned, pruner, pattern):
    run = pruned(pruner, weight={"sparsity": 0.5, "pattern": pattern}, eval={"eval_pos": []})
    run.compress()
    original, written = tensors_of(run.source), tensors_of(run.save_path / FAKE)
    assert original.keys() == written.keys()
    for name, tensor in written.items():
        assert tensor.dtype == torch.bfloat16
        if not is_linear(name):
            assert torch.equal(tensor, original[name])
            continue
        assert (tensor == 0).float().mean() == 0.5
        if pattern is not None:
            assert most_zeros_in_a_run(tensor, 4) == (2, 2)
        if pruner == "Wanda" and pattern is None:
            assert ((tensor == 0).sum(1) == tensor.shape[1] // 2).all()
        assert torch.equal(tensor[tensor != 0], original[name][tensor != 0]) == (pruner != "SparseGPT")
    assert files_of(run.save_path / FAKE) == files_of(run.save_path / TRANS)
    assert json.loads((run.save_path / FAKE / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("pruner", "family", "sparsity_out"),
    [("Magnitude", "llama", None), ("Wanda", "opt", None), ("SparseGPT", "llama", None), ("SparseGPT", "opt", False)],
)
def test_the_perplexities_are_those_of_the_written_model(pruned, source_of, pruner, family, sparsity_out):
    positions = {"eval_pos": ["pretrain", "transformed", "fake_quant"]}
    run = pruned(pruner, checkpoint=source_of(family), eval=positions, sparse={"sparsity_out": sparsity_out})
    measured = perplexities(run)
    assert measured["pretrain"] == pytest.approx(whole_model_perplexity(run, run.source), rel=1e-6)
    assert measured["fake_quant"] == pytest.approx(whole_model_perplexity(run, run.save_path / FAKE), rel=1e-6)
    assert measured["transformed"] == measured["fake_quant"] != pytest.approx(measured["pretrain"], rel=1e-4)


@pytest.mark.parametrize(
    ("pruner", "method"),
    [("Magnitude", "GPTQ"), ("Wanda", "RTN"), ("Wanda", "Awq"), ("SparseGPT", "GPTQ"), ("SparseGPT", ["Awq", "GPTQ"])],
    ids=str,
)
def test_a_quantizer_keeps_every_zero_and_each_position_is_its_own_model(pruned, pruner, method):
    positions = {"eval_pos": ["pretrain", "transformed", "fake_quant"]}
    run = pruned(pruner, method, TWO_OF_FOUR, eval=positions)
    measured = perplexities(run)
    floats, rounded = (tensors_of(run.save_path / folder) for folder in (TRANS, FAKE))
    for name in filter(is_linear, floats):
        assert most_zeros_in_a_run(floats[name], 4) == (2, 2)
        assert not rounded[name][floats[name] == 0].any()
        assert not torch.equal(rounded[name], floats[name])
    assert measured["transformed"] == pytest.approx(whole_model_perplexity(run, run.save_path / TRANS), rel=1e-6)
    for folder, options in ((FAKE, {}), (VLLM, {"quantization_config": CompressedTensorsConfig(dequantize=True)})):
        written = whole_model_perplexity(run, run.save_path / folder, **options)
        assert measured["fake_quant"] == pytest.approx(written, rel=1e-6)


def test_a_quantizer_that_revives_a_weight_is_stopped(pruned, monkeypatch):
    def careless(self: RTN, view: Any) -> None:
        for name, spec in view.specs.items():
            view.put(name, quantize_weight(torch.ones_like(view.linears[name].weight), spec), LayerNote())

    monkeypatch.setattr(RTN, "subset", careless)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: the quantizer has revived pruned weights"):
        pruned("Magnitude", "RTN").compress()


def test_pruned_outputs_propagate_as_asked(pruned):
    """The first block's inputs are the same either way, those of the second aren't."""
    runs = [pruned("Wanda", eval={"eval_pos": []}, sparse={"sparsity_out": out}) for out in (None, True, False)]
    for run in runs:
        run.compress()
    habit, propagated, dense = (tensors_of(run.save_path / FAKE) for run in runs)
    assert all(torch.equal(habit[name], propagated[name]) for name in habit)
    differing = {int(name.split(".")[2]) for name in habit if not torch.equal(habit[name], dense[name])}
    assert differing == {1, 2, 3}


def test_sequential_pruning_sees_the_subsets_before_it(pruned):
    """The attention's output is the first that sees something else: q, k and v."""
    specials = [{"true_sequential": sequential} for sequential in (False, True)]
    runs = [pruned("SparseGPT", eval={"eval_pos": []}, sparse={"special": special}) for special in specials]
    for run in runs:
        run.compress()
    at_once, in_turn = (tensors_of(run.save_path / FAKE) for run in runs)
    first = {name for name in at_once if ".layers.0." in name and not torch.equal(at_once[name], in_turn[name])}
    assert first == {f"model.layers.0.{n}_proj.weight" for n in ("self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}


RECIPES = [
    ("Magnitude", None, None, {}),
    ("Wanda", None, None, {}),
    ("Wanda", None, False, {}),
    ("SparseGPT", None, None, {"true_sequential": True}),
    ("SparseGPT", None, False, {"true_sequential": True}),
    ("SparseGPT", None, None, {}),
    ("Wanda", "RTN", None, {}),
    ("SparseGPT", "GPTQ", None, {}),
    ("SparseGPT", ["Awq", "GPTQ"], False, {"true_sequential": True}),
]


@pytest.mark.parametrize(("pruner", "method", "out", "special"), RECIPES, ids=str)
def test_however_it_is_run_and_wherever_it_is_killed_the_bytes_and_numbers_are_the_same(
    pruned, pruner, method, out, special
):
    def make(**base: Any) -> Case:
        sparse = {"sparsity_out": out, "special": special}
        positions = {"eval_pos": ["transformed", "fake_quant"]}
        return pruned(pruner, method, TWO_OF_FOUR, sparse=sparse, eval=positions, base=base)

    calm, replayed = make(checkpoint_every=2), make(forward="replay")
    expected = perplexities(calm)
    assert perplexities(replayed) == expected
    assert replayed.written() == calm.written()
    run = make(checkpoint_every=2)
    with pytest.raises(Killed):
        compress(run.content, listener=Assassin(2))  # the third block is behind the checkpoint: it's replayed
    assert perplexities(run) == expected
    assert run.written() == calm.written()


def test_without_a_compressed_model_to_save_a_killed_run_goes_on_from_its_own_copy(pruned):
    runs = [pruned("Wanda", save={"save_fake": False}, base={"checkpoint_every": 2}) for _ in range(2)]
    expected = perplexities(runs[0])
    with pytest.raises(Killed):
        compress(runs[1].content, listener=Assassin(2))
    assert perplexities(runs[1]) == expected
    assert runs[1].written() == runs[0].written()
    told = {"metrics.json", "report.html", "surfaces.safetensors"}
    assert {path.name for path in runs[1].save_path.iterdir()} == {*told, TRANS}


def test_the_metrics_and_the_summary_tell_the_sparsity(pruned, capsys):
    run = pruned("Wanda", "GPTQ", {"sparsity": 0.25})
    assert main(run.arguments) == 0
    metrics = json.loads((run.save_path / "metrics.json").read_text())
    assert metrics["sparsity"] == {"ratio": 0.25, "pattern": None, "mean": 0.25}
    for block in metrics["blocks"]:
        assert len(block["layers"]) == 7
        assert all(layer["sparsity"] == 0.25 for layer in block["layers"].values())
        assert all(0 < layer["pruning_error"] < 0.2 and layer["error"] > 0 for layer in block["layers"].values())
    assert "25.00% of the weights in the pruned layers are zero" in capsys.readouterr().out


def test_every_tensor_is_read_once(pruned):
    metrics = pruned("SparseGPT", "GPTQ").compress().metrics
    assert metrics["bytes_read"] == metrics["model"]["bytes"]


def test_ignored_linears_are_neither_pruned_nor_quantized(pruned):
    run = pruned("SparseGPT", "GPTQ", ignored_layers={"layer_names": ["mlp.down_proj"], "block_ids": [1]})
    run.compress()
    original, written = tensors_of(run.source), tensors_of(run.save_path / FAKE)
    same = {name for name in filter(is_linear, written) if torch.equal(written[name], original[name])}
    assert same == {"model.layers.1.mlp.down_proj.weight"}


def test_a_dry_run_shows_the_sparsity_of_every_layer(pruned, capsys, monkeypatch):
    monkeypatch.setattr(BlockSource, "_read", lambda self, unit: pytest.fail(f"{unit} is read"))
    alone = pruned("Wanda", weight=TWO_OF_FOUR, ignored_layers={"layer_names": ["down_proj"]})
    assert main([*alone.arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "24 x 2:4 zeros; 4 x kept" in shown
    assert "save_fake (checked)" in shown
    both = pruned("Wanda", "GPTQ")
    assert main([*both.arguments, "--dry-run"]) == 0
    assert "28 x 50% zeros, W4 g32 asym" in capsys.readouterr().out
    assert not alone.save_path.exists() and not both.save_path.exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sparse.weight.sparsity=1.0"], ["sparse.weight.sparsity", "1.0 is too large", "below 1"]),
        (["sparse.weight.sparsity=-0.1"], ["sparse.weight.sparsity", "-0.1"]),
        (["sparse.weight.sparsity=50"], ["sparse.weight.sparsity", "50"]),
        (["sparse.weight.sparsity=.nan"], ["sparse.weight.sparsity", "nan"]),
        (["sparse.weight={}"], ["sparse.weight", "Wanda needs sparsity"]),
        (["sparse.weight.pattern=4:2"], ["sparse.weight.pattern", "'4:2'", "2 zeros in each 4"]),
        (["sparse.weight.pattern=124"], ["sparse.weight.pattern", "124", "in quotes"]),
        (["sparse.weight.pattern=1:4"], ["sparse.weight", "1:4 is 1 zeros in each 4", "sparsity 0.25", "not 0.5"]),
        (["sparse.weight.pattern=12:24"], ["sparse.weight.pattern", "runs of 24", "64 input channels", "q_proj"]),
        (["sparse.method=Wands"], ["sparse.method", "Wands"]),
        (["sparse.method=GPTQ"], ["sparse.method", "GPTQ"]),
        (["sparse.method=Dense"], ["sparse.method: Dense", "not available", "Wanda"]),
        (["sparse.special={blocksize: 64}"], []),
        (["sparse.special={blocksiz: 64}"], ["sparse.special.blocksiz", "unknown key"]),
        (["sparse.kvcache={method: SinkKV}"], ["sparse.kvcache", "not available"]),
        (["calib=null"], ["Wanda needs calibration text"]),
        (["save.save_vllm=true"], ["save_vllm", "save_fake", "vLLM loads that folder"]),
        (
            ["quant={method: [Wanda, RTN], weight: {bit: 4, symmetric: true, granularity: per_channel}}"],
            ["quant.method: Wanda prunes", "sparse: {method: Wanda", "['RTN']"],
        ),
        (["quant={method: Awq}"], ["quant.weight is missing"]),
    ],
    ids=lambda value: value[0] if value and "=" in value[0] else "",
)
def test_bad_input_is_refused_before_anything_is_read(pruned, capsys, monkeypatch, overrides, said):
    monkeypatch.setattr(BlockSource, "prefetch", lambda self, unit: pytest.fail(f"{unit} is read"))
    run = pruned("Wanda")
    code = main([*run.arguments, "--dry-run", *(part for text in overrides for part in ("--set", text))])
    message = capsys.readouterr().err
    assert code == (2 if said else 0)
    assert not [text for text in said if text not in message], message
    assert message.count("error: ") == bool(said)
    assert not run.save_path.exists()
