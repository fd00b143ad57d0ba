"""A budget of bits: losses as of the whole model, the best choice there is, and a run that is that of its settings."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
import yaml
from cases import files_of, reload
from test_mixed import same_dense_weights
from test_pipeline import FAKE, VLLM
from torch import nn
from transformers import AutoTokenizer

import llmc
import llmc.budget.budgeting
from llmc.algorithms import options_types
from llmc.cli import main
from llmc.config import load_config
from llmc.errors import LlmcError
from llmc.run import Silent

SCHEMES = [{"bit": 4}, {"bit": 8, "symmetric": True}]
MIXED = {"mix_bits": {"budget": 6.0, "candidates": SCHEMES}}
ANY = {"save_vllm": False, "save_fake": True}
SIX = [{"bit": 2}, {"bit": 4, "group_size": 64}, {"bit": 6, "symmetric": True}]


class Killed(BaseException):
    pass


class Fatal(Silent):
    """Kills the run behind a block, or at a phase."""

    def __init__(self, block=None, phase=None):
        self._block, self._phase = block, phase

    def block(self, index, row):
        if index == self._block:
            raise Killed

    def phase(self, text):
        if self._phase is not None and text.startswith(self._phase):
            raise Killed


class Measures(Silent):
    """Hears whether anything is measured."""

    def __init__(self):
        self.phases = []

    def phase(self, text):
        if text.startswith("sensitivity"):
            self.phases.append(text)


def sensitivity(run) -> dict:
    assert main(["sensitivity", *run.arguments]) == 0
    return json.loads((run.save_path / "sensitivity.json").read_text())


def windows(run) -> list[torch.Tensor]:
    calib = run.content["calib"]
    with open(calib["path"]) as file:
        ids = AutoTokenizer.from_pretrained(run.source)(file.read(), add_special_tokens=False)["input_ids"]
    length = calib["seq_len"]
    return [torch.tensor(ids[index * length :][:length])[None] for index in range(calib["n_samples"])]


def by_hand(run, candidates) -> dict[str, tuple[float, list[float]]]:
    """Importance and relative errors of every Linear, from the whole model in Transformers."""
    model = reload(run.source)
    linears = {name: module for name, module in model.named_modules() if ".layers." in name and hasattr(module, "bias")}
    linears = {name: module for name, module in linears.items() if isinstance(module, nn.Linear)}
    seen: dict[str, dict[str, list[torch.Tensor]]] = {name: {"x": [], "y": [], "g": []} for name in linears}

    def look(name):
        def hook(module, args, output):
            seen[name]["x"].append(args[0][0].detach())
            seen[name]["y"].append(output[0].detach())
            output.register_hook(lambda gradient: seen[name]["g"].append(gradient[0]))

        return hook

    for name, module in linears.items():
        module.register_forward_hook(look(name))
    generator = torch.Generator().manual_seed(run.content["base"]["seed"])
    for ids in windows(run):
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    found = {}
    for name, module in linears.items():
        x, y, g = (torch.cat(seen[name][part]).double() for part in "xyg")
        importance = 0.5 * float(g.square().mean() * y.square().sum(1).mean())
        plain = module.weight.double()
        errors = []
        for bits, size, symmetric in candidates:
            change = x @ (grid(module.weight, bits, size, symmetric).double() - plain).T
            errors.append(float(change.square().sum() / (x @ plain.T).square().sum()))
        found[name] = importance, errors
    return found


def grid(weight, bits, size, symmetric):
    """Rounded to nearest in groups, with scales in bfloat16, written down anew."""
    groups = weight.float().reshape(len(weight), -1, size)
    top = 2 ** (bits - 1) - 1
    if symmetric:
        scale = (groups.abs().amax(-1, keepdim=True) / top).bfloat16().float()
        return ((groups / scale).round().clamp(-top - 1, top) * scale).bfloat16().float().view_as(weight)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).bfloat16().float()
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    codes = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).bfloat16().float().view_as(weight)


def test_importances_and_errors_are_those_of_the_whole_model(case):
    run = case(quant={"mix_bits": {"budget": 4.0, "candidates": SIX}}, save=ANY)
    found = sensitivity(run)
    assert [one["name"] for one in found["candidates"]] == ["W2 g32 asym", "W4 g64 asym", "W6 g32 sym"]
    expected = by_hand(run, [(2, 32, False), (4, 64, False), (6, 32, True)])
    assert {layer["name"] for layer in found["layers"]} == expected.keys()
    for layer in found["layers"]:
        importance, errors = expected[layer["name"]]
        assert layer["importance"] == pytest.approx(importance, rel=1e-3)
        assert [trial["error"] for trial in layer["trials"]] == pytest.approx(errors, rel=1e-3)
        assert [trial["loss"] for trial in layer["trials"]] == pytest.approx(
            [importance * one for one in errors], rel=2e-3
        )
        assert [trial["bits"] for trial in layer["trials"]] == [2 + 18 / 32, 4 + 20 / 64, 6 + 16 / 32]


def groups_of(found) -> dict[int, list]:
    groups: dict[int, list] = {}
    for layer in found["layers"]:
        groups.setdefault(layer["together"], []).append(layer)
    return groups


def test_the_choice_is_the_best_of_all_and_the_run_is_that_of_its_settings(case):
    run = case(method="GPTQ", quant=MIXED)
    metrics = run.compress().metrics
    found = json.loads((run.save_path / "sensitivity.json").read_text())
    groups = groups_of(found)
    kinds = [tuple(layer["kind"].rpartition(".")[2] for layer in group) for group in list(groups.values())[:4]]
    assert kinds == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    losses = np.array([[sum(one["trials"][i]["loss"] for one in group) for i in range(2)] for group in groups.values()])
    weights = np.array([sum(one["rows"] * one["columns"] for one in group) for group in groups.values()])
    choices = np.array(list(product((0, 1), repeat=len(groups))))
    bits = np.where(choices == 0, 4 + 20 / 32, 8 + 16 / 32) @ weights / weights.sum()
    sums = np.where(choices == 0, losses[:, 0], losses[:, 1]).sum(1)
    best = int(np.where(bits <= 6.0, sums, np.inf).argmin())
    spent = metrics["bit_budget"]
    assert spent["loss"] == pytest.approx(sums[best], rel=1e-9)
    assert spent["bits_per_weight"] == metrics["bits_per_weight"] == pytest.approx(bits[best])
    assert 0 < choices[best].sum() < len(groups)
    assert same_dense_weights(run)
    again = case(method="GPTQ", quant=yaml.safe_load(spent["yaml"]))
    again.compress()
    assert again.written() == run.written()
    config = json.loads((run.save_path / VLLM / "config.json").read_text())["quantization_config"]
    assert sorted(group["weights"]["num_bits"] for group in config["config_groups"].values()) == [4, 8]


def test_the_plan_counts_what_measuring_reads(case):
    """Three readings, of which one may leave out what is in front of the blocks and behind them."""
    run = case(quant=MIXED)
    prepared, _ = llmc.budget.budgeting.ready(load_config(run.content, (), options_types()))
    outside = sum(entry.nbytes for name, entry in prepared.entries.items() if ".layers." not in name)
    read = run.compress().metrics["bytes_read"]
    assert read <= prepared.estimate.read <= read + outside


def test_a_file_of_losses_gives_the_same_without_measuring(case, capsys):
    measured = case(quant=MIXED)
    measured.compress()
    file = measured.save_path / "sensitivity.json"
    run = case(quant={"mix_bits": {**MIXED["mix_bits"], "from": str(file)}})
    assert main([*run.arguments, "--dry-run"]) == 0
    assert "W8 g32 sym" in capsys.readouterr().out
    listener = Measures()
    llmc.compress(run.content, listener=listener)
    assert run.written() == measured.written()
    assert not listener.phases


@pytest.mark.parametrize("fatal", [{"phase": "sensitivity: backward"}, {"block": 2}])
def test_a_killed_run_goes_on_to_the_same_bytes(case, fatal):
    whole, killed = case(method="GPTQ", quant=MIXED), case(method="GPTQ", quant=MIXED)
    whole.compress()
    with pytest.raises(Killed):
        llmc.compress(killed.content, listener=Fatal(**fatal))
    listener = Measures()
    llmc.compress(killed.content, listener=listener)
    assert killed.written() == whole.written()
    assert bool(listener.phases) == ("phase" in fatal)  # a choice that was made isn't made again


@pytest.mark.parametrize("method", [["Quarot", "GPTQ"], ["Awq"], ["SmoothQuant", "GPTQ"], ["OmniQuant"]])
def test_with_every_quantizer_and_behind_transforms(case, source_of, method):
    special = {"OmniQuant": {"epochs": 1}} if method == ["OmniQuant"] else {}
    source = source_of("llama-tied")
    run = case(source, method, quant={"mix_bits": {"budget": 4.5, "candidates": SIX}, "special": special}, save=ANY)
    found = run.compress().metrics
    assert 4.3 < found["bits_per_weight"] <= 4.5
    assert len(found["bit_budget"]["mix_bits"]) >= 2


def test_settings_are_fixed_first_and_count(case):
    wide = {"layer_name": ["down_proj#0..2"], "weight": {"bit": 8, "symmetric": True, "granularity": "per_channel"}}
    kept = {"layer_name": ["o_proj#1"], "do_quant": False}
    run = case(quant={"mix_bits": {"wide": wide, "kept": kept, **MIXED["mix_bits"]}})
    metrics = run.compress().metrics
    found = json.loads((run.save_path / "sensitivity.json").read_text())
    names = {layer["name"] for layer in found["layers"]}
    assert "model.layers.3.mlp.down_proj" in names
    assert not names & {"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"}
    assert metrics["bits_per_weight"] <= 6.0
    assert list(metrics["config"]["quant"]["mix_bits"])[:2] == ["wide", "kept"]


def test_a_finished_run_is_exported_again(case):
    run = case(quant=MIXED, save={"save_vllm": True, "save_fake": False})
    run.compress()
    both = case(quant=MIXED)
    both.compress()
    assert main(["export", "--from", str(run.save_path), "--to", "fake"]) == 0
    assert files_of(run.save_path / FAKE) == files_of(both.save_path / FAKE)


def test_nothing_saved_is_evaluated_all_the_same(case):
    run = case(quant={"mix_bits": {"budget": 4.5, "candidates": SIX}}, save={"save_vllm": False, "save_fake": False})
    run.content["save"].pop("save_path")
    assert run.compress().metrics["bit_budget"]["bits_per_weight"] <= 4.5


def test_usual_candidates_are_those_that_can_be_stored(case):
    def usual(**changes):
        run = case(quant={"mix_bits": {"budget": 5}}, **changes)
        _, spending = llmc.budget.budgeting.ready(load_config(run.content, (), options_types()))
        return [one.name for one in spending.budget.candidates]

    assert usual() == [*(f"W{bits} g32 asym" for bits in (2, 3, 4, 5, 6)), "W8 g32 sym"]
    assert usual(save=ANY) == [*(f"W{bits} g32 asym" for bits in (2, 3, 4, 5, 6, 8)), "W8 g32 sym"]


@pytest.mark.parametrize(
    ("mix_bits", "changes", "said"),
    [
        ({"budget": 2.5}, {}, "2.5 bits per weight, but the candidates take from 2.5625 to 8.5000"),
        ({"budget": 9}, {}, "9 bits per weight, but the candidates take from 2.5625 to 8.5000"),
        ({"budget": 5.0, "candidates": [{"bit": 4}, {"bit": 8}]}, {}, "candidates, entry 1 (W8 g32 asym)"),
        ({"budget": 4.0, "candidates": [{"bit": 3, "group_size": 48}, {"bit": 4}]}, {"save": ANY}, "48 doesn't divide"),
        ({"budget": 5, "from": "gone.json"}, {}, "quant.mix_bits.from: gone.json can't be read"),
        ({"budget": 5}, {"calib": None}, "quant.mix_bits.budget needs calibration text"),
        ({"budget": 5}, {"save": {"save_autoawq": True, "save_vllm": False}}, "save_autoawq stores one scheme"),
        ({"budget": 5}, {"model": {"torch_dtype": "float16"}}, "float16 is too narrow"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(case, monkeypatch, mix_bits, changes, said):
    monkeypatch.setattr("llmc.stream.source.BlockSource.take", lambda *args: pytest.fail("a weight was read"))
    run = case(quant={"mix_bits": mix_bits}, **changes)
    with pytest.raises(LlmcError) as error:
        run.compress()
    assert said in str(error.value)


def test_losses_of_another_model_version_or_scheme_are_refused(case, source_of, tmp_path):
    run = case(quant={"mix_bits": {"budget": 5, "candidates": SCHEMES}})
    found, file = sensitivity(run), tmp_path / "losses.json"
    settings = {"budget": 5, "from": str(file)}
    other = case(source_of("qwen2"), quant={"mix_bits": settings})
    for content, given, said in [
        ({**found, "schema": 9}, run, "isn't a sensitivity.json of schema 1, but 9"),
        ({**found, "layers": [{}]}, run, "is damaged"),
        ({**found, "layers": found["layers"][1:]}, run, "has no losses of model.layers.0.self_attn.q_proj"),
        (found, other, "is of another model"),
    ]:
        file.write_text(json.dumps(content))
        given.content["quant"]["mix_bits"] = settings
        with pytest.raises(LlmcError, match=said):
            llmc.budget.budgeting.ready(load_config(given.content, (), options_types()))
    settings["candidates"] = [{"bit": 4}, {"bit": 4, "symmetric": True}]
    file.write_text(json.dumps(found))
    with pytest.raises(LlmcError, match="no losses with W4 g32 sym, only with W4 g32 asym, W8 g32 sym"):
        llmc.budget.budgeting.ready(load_config(run.content, (), options_types()))
