"""Which tokens calibrate which expert, and what becomes of experts that see few or none."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from families import expert_weights, fused_experts
from safetensors.torch import load_file, save_file
from scipy.stats import kurtosis
from tiny import Tiny
from torch import Tensor

import llmc.stream.block_subsets
from llmc.algorithms import SubsetView
from llmc.algorithms.gptq import GPTQ
from llmc.algorithms.stats import Gram
from llmc.cli import main

MIXED = ["mixtral", "qwen2-moe", "deepseek-v3"]  # without and with shared experts, run first and last
VLLM = "vllm_quant_model"


@pytest.fixture
def grams(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What GPTQ is given for each Linear, behind the number of earlier blocks that have such a Linear."""
    found: dict[str, Tensor] = {}
    original = GPTQ.solve

    def solve(self: GPTQ, views: Sequence[SubsetView]) -> None:
        for view in views:
            assert view.stats.gram is not None
            for name in view.linears:
                place = f"{len([key for key in found if key.endswith('/' + name)])}/{name}"
                found[place] = view.stats.gram.matrix.clone()
        original(self, views)

    monkeypatch.setattr(GPTQ, "solve", solve)
    return found


def calibration_tokens(case: Case) -> Tensor:
    """``[samples, tokens]`` as the run cuts them."""
    from llmc.algorithms import options_types
    from llmc.config import load_config
    from llmc.prepare import prepare

    return torch.cat([batch.tokens for batch in prepare(load_config(case.content, (), options_types())).calib])


@torch.no_grad()
def routed_inputs(tiny: Tiny, tokens: Tensor, *, everyone: bool) -> dict[str, Tensor]:
    """The inputs of every expert's Linears in the original model, float64, by Transformers' own router and weights."""
    model = tiny.model()
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for number, (path, fused) in enumerate(fused_experts(model).items()):
        place = f"{number}/{path.split('.', 3)[3]}"
        weights = {name: weight.double() for name, weight in expert_weights(fused).items()}

        def look(module: Any, args: tuple[Tensor, ...], place: str = place, weights: Any = weights) -> None:
            hidden, chosen = args[0].double(), args[1]
            for index in range(4):
                own = hidden if everyone else hidden[(chosen == index).any(1)]
                gate, up = (own @ weights[f"{index}.{name}.weight"].T for name in ("gate_proj", "up_proj"))
                for name, inputs in (("gate_proj", own), ("up_proj", own), ("down_proj", gate.sigmoid() * gate * up)):
                    found.setdefault(f"{place}.{index}.{name}", []).append(inputs)

        hooks.append(fused.register_forward_pre_hook(look))
    for sample in tokens:
        model(input_ids=sample[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("moe", ["routed", "all_tokens"])
def test_the_statistics_of_an_expert_are_those_of_its_tokens(case, checkpoint, grams, family, moe):
    """Before anything is rounded: GPTQ on the original's activations, none of its subsets waiting for another."""
    one = case(
        family,
        "GPTQ",
        calib={"moe": moe, "moe_min_tokens": 0},
        quant={"quant_out": False, "special": {"true_sequential": False}},
        eval={"eval_pos": []},
    )
    result = one.compress()
    expected = routed_inputs(checkpoint(family), calibration_tokens(one), everyone=moe == "all_tokens")
    assert expected and expected.keys() == {name for name in grams if ".experts." in name}
    for name, inputs in expected.items():
        gram = inputs.T @ inputs
        torch.testing.assert_close(grams[name].double(), gram, rtol=1e-4, atol=1e-4 * float(gram.abs().max()))
    notes = {
        f"{number}/{name}": note["tokens"]
        for number, block in enumerate(result.metrics["blocks"][-len(result.metrics["experts"]) :])
        for name, note in block["layers"].items()
        if "tokens" in note
    }
    assert notes == {name: len(inputs) for name, inputs in expected.items()}


@pytest.mark.parametrize("method", ["GPTQ", "Awq"])
@pytest.mark.parametrize("family", MIXED)
def test_staged_and_replayed_write_the_same_bytes(case, family, method):
    written = {}
    for moe in ("routed", "all_tokens"):
        runs = [
            case(family, method, base={"forward": forward}, calib={"moe": moe}, eval={"eval_pos": []})
            for forward in ("staged", "replay")
        ]
        for run in runs:
            run.compress()
        written[moe] = [run.written() for run in runs]
        assert written[moe][0] == written[moe][1]
    assert written["routed"][0] != written["all_tokens"][0]


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("moe", ["routed", "all_tokens"])
def test_how_many_experts_are_solved_at_a_time_changes_nothing(case, monkeypatch, moe, sequential):
    quant = {"special": {"true_sequential": sequential}}
    runs = [case("qwen2-moe", "GPTQ", calib={"moe": moe}, quant=quant, eval={"eval_pos": []}) for _ in range(2)]
    runs[0].compress()
    monkeypatch.setattr(llmc.stream.block_subsets, "_TOGETHER", 1)
    runs[1].compress()
    assert runs[0].written() == runs[1].written()


# --- experts with few tokens or none ---------------------------------------------------------------------------------


def make_shy(folder: Path, expert: int = 2) -> Path:
    """No router ever chooses an expert: the first channel of the residual is large, always the same, and read only by
    the routers, whose score of that expert it takes far down."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            leaf = name.split(".")[-2]
            if leaf == "embed_tokens":
                tensor[:, 0] = 4.0
            elif leaf in ("input_layernorm", "norm"):
                tensor[0] = 0.0
            elif leaf == "post_attention_layernorm":
                tensor[0] = 1.0
            elif leaf in ("o_proj", "down_proj", "w2"):
                tensor[0] = 0.0
            elif leaf in ("gate_proj", "up_proj", "w1", "w3", "gate"):
                tensor[:, 0] = 0.0
            if leaf == "gate":
                tensor[expert] = 0.0
                tensor[expert, 0] = -20.0
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def shy(source_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: make_shy(shutil.copytree(source_of(family), tmp_path / family))


def tensors_of(folder: Path, within: str = "") -> dict[str, Tensor]:
    every = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: tensor for name, tensor in every.items() if within in name}


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_an_expert_that_is_never_chosen_is_solved_with_the_tokens_of_all(case, shy, capsys, family):
    run = case(shy(family), "GPTQ")
    assert main(run.arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    enough = 12 if family == "mixtral" else 8  # an eighth of the widest input
    for block in range(2):
        line = (
            f"block-{block}: 1 of 4 experts saw fewer than {enough} calibration tokens (fewest: expert 2 with 0) "
            "and were solved with those of all experts"
        )
        assert said.count(line) == 1
    assert said.count("warning:") == 2 and "2 of 8 saw few calibration tokens" in said
    metrics = json.loads((run.save_path / "metrics.json").read_text())
    assert metrics["fallbacks"] == []
    for block, experts in zip(metrics["blocks"], metrics["experts"], strict=True):
        assert experts["block"] == block["unit"] and experts["experts"] == 4
        assert experts["solved_with_all_tokens"] == [2] and experts["tokens"]["fewest"] == 0
        own = {name: note for name, note in block["layers"].items() if ".experts.2." in name}
        assert len(own) == 3 and all(note["tokens"] == 0 and note["wanted"] in (8, 12) for note in own.values())
        others = [note for name, note in block["layers"].items() if ".experts." in name and name not in own]
        assert all(note["tokens"] >= 12 and note["wanted"] is None for note in others)
        assert sum(note["tokens"] for note in others) == 3 * 2 * 64  # three Linears, two experts a token
        assert all(note["damp"] is not None for note in own.values()), "it was solved"
    stored = tensors_of(run.save_path / VLLM, ".experts.2.")
    assert len([name for name in stored if name.endswith("_packed")]) == 6
    assert all(tensor.isfinite().all() for tensor in stored.values() if tensor.is_floating_point())
    values = [one["value"] for one in metrics["evaluation"]]
    assert 0.5 < values[1] / values[0] < 2


def test_what_it_is_solved_with_is_the_sum_of_what_the_others_read(case, shy, grams):
    plain = {"quant_out": False, "special": {"true_sequential": False}}
    case(shy("mixtral"), "GPTQ", quant=plain, eval={"eval_pos": []}).compress()
    for block in range(2):
        for linear in ("gate_proj", "up_proj", "down_proj"):
            own = {index: grams[f"{block}/mlp.experts.{index}.{linear}"] for index in range(4)}
            torch.testing.assert_close(own[2], own[0] + own[1] + own[3], rtol=1e-4, atol=1e-3)


def test_without_a_least_number_it_is_rounded_to_nearest(case, shy, capsys):
    source = shy("mixtral")
    run, plain = case(source, "GPTQ", calib={"moe_min_tokens": 0}), case(source, "RTN")
    assert main(run.arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    why = "no calibration token reaches it: rounded to nearest"
    for block in range(2):
        assert said.count(f"block-{block}: 1 of 4 experts (fewest: expert 2 with 0): {why}") == 1
    assert said.count("warning:") == 2
    plain.compress()
    solved, rounded = (tensors_of(one.save_path / VLLM, ".experts.2.") for one in (run, plain))
    assert solved.keys() == rounded.keys() and all(torch.equal(solved[name], rounded[name]) for name in solved)
    others = (tensors_of(one.save_path / VLLM, ".experts.1.") for one in (run, plain))
    assert any(not torch.equal(a, b) for a, b in zip(*(one.values() for one in others), strict=True))


def test_the_least_number_of_tokens_is_the_users(case):
    """Set to one more than the fewest, just that expert takes others' tokens."""
    counted = case("mixtral", "GPTQ", calib={"moe_min_tokens": 0}, eval={"eval_pos": []}).compress().metrics
    block = counted["blocks"][0]["layers"]
    counts = {index: block[f"mlp.experts.{index}.up_proj"]["tokens"] for index in range(4)}
    fewest = min(counts.values())
    limited = case("mixtral", "GPTQ", calib={"moe_min_tokens": fewest + 1}, eval={"eval_pos": []}).compress().metrics
    expected = [index for index, count in counts.items() if count == fewest]
    assert limited["experts"][0]["solved_with_all_tokens"] == expected and len(expected) < 4
    assert limited["experts"][0]["wanted"] == fewest + 1


def test_with_all_tokens_nobody_has_too_few(case, shy, capsys):
    run = case(shy("mixtral"), "GPTQ", calib={"moe": "all_tokens"})
    assert main(run.arguments) == 0
    assert "warning:" not in capsys.readouterr().out
    metrics = json.loads((run.save_path / "metrics.json").read_text())
    for experts in metrics["experts"]:
        assert experts["tokens"] == {"fewest": 64, "median": 64, "most": 64}
        assert experts["solved_with_all_tokens"] == []


W8 = {"bit": 8, "symmetric": True, "granularity": "per_channel"}
STATIC = {"granularity": "per_tensor", "static": True}
LEARN = {"special": {"epochs": 1, "let": True, "lwc": True}}
HALF = {"sparsity": 0.5}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("Awq", {}),
        ("SmoothQuant", {"quant": {"weight": W8, "act": {**W8, "granularity": "per_token"}}}),
        ("OmniQuant", {"quant": LEARN}),
        ("RTN", {"sparse": {"method": "Wanda", "weight": HALF}}),
        ("RTN", {"sparse": {"method": "SparseGPT", "weight": HALF}, "calib": {"moe_min_tokens": 0}}),
        ("RTN", {"quant": {"weight": W8, "act": {"bit": 8, "symmetric": False, **STATIC}}}),
        (
            "GPTQ",
            {"quant": {"weight": W8, "act": {"bit": 8, "symmetric": True, **STATIC, "calib_algo": "static_hist"}}},
        ),
    ],
    ids=["AWQ", "SmoothQuant", "OmniQuant", "Wanda", "SparseGPT", "static minmax", "static hist"],
)
def test_every_method_copes_with_an_expert_without_tokens(case, shy, method, changes):
    source = shy("mixtral")
    run = case(source, method, **changes)
    result = run.compress()
    values = {one.position: one.value for one in result.perplexities}
    assert 0.5 < values["fake_quant"] / values["pretrain"] < 2
    stored, original = tensors_of(run.save_path / "fake_quant_model"), tensors_of(source)
    own = [name for name in original if ".experts.2." in name]
    assert len(own) == 6 and all(not torch.equal(stored[name], original[name]) for name in own)
    assert all(tensor.isfinite().all() for tensor in stored.values())


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("moe", ["routed", "all_tokens"])
def test_gram_matrices_do_not_pile_up_with_the_number_of_experts(case, tmp_path, monkeypatch, moe, sequential):
    """Those that are solved together, and the one of all experts' tokens."""
    from cases import write_tokenizer
    from families import COMMON
    from tiny import write_checkpoint
    from transformers import MixtralConfig

    peaks = {}
    alive: list[int] = []

    def begin(gram: Gram, columns: int, device: torch.device, original: Any = Gram.__init__) -> None:
        original(gram, columns, device)
        alive.append(columns)
        weakref.finalize(gram, alive.remove, columns)
        peaks[experts] = max(peaks.get(experts, 0), sum(one**2 for one in alive))

    monkeypatch.setattr(Gram, "__init__", begin)
    monkeypatch.setattr(llmc.stream.block_subsets, "_TOGETHER", 2 * 4 * 96**2)
    for experts in (4, 16):
        folder = tmp_path / f"with-{experts}"
        write_checkpoint(MixtralConfig(**COMMON, num_local_experts=experts, num_experts_per_tok=2), folder)
        write_tokenizer(folder)
        quant = {"special": {"true_sequential": sequential}}
        case(folder, "GPTQ", calib={"moe": moe, "moe_min_tokens": 1000}, quant=quant, eval={"eval_pos": []}).compress()
        gc.collect()
        assert not alive
    assert peaks[4] == peaks[16] == 3 * 96**2


@pytest.mark.parametrize("moe", ["routed", "all_tokens"])
def test_the_analysis_looks_at_the_tokens_of_each_expert(case, checkpoint, moe):
    """Those that are routed to it, however it is calibrated: in the first block they are the original's."""
    one = case("mixtral", "GPTQ", calib={"moe": moe, "moe_min_tokens": 0}, eval={"eval_pos": []})
    metrics = one.compress().metrics
    block, counts = metrics["blocks"][0], metrics["experts"][0]["counts"]
    inputs = routed_inputs(checkpoint("mixtral"), calibration_tokens(one), everyone=False)
    first = {name.removeprefix("0/"): tokens for name, tokens in inputs.items() if name.startswith("0/")}
    assert {name: block["layers"][name]["sample_tokens"] for name in first} == {n: len(x) for n, x in first.items()}
    assert counts == [block["layers"][f"mlp.experts.{index}.up_proj"]["tokens"] for index in range(4)]
    assert counts == [64] * 4 or moe == "routed"
    for key, leaf in (("gate_proj+mlp.experts.*.up_proj", "gate_proj"), ("down_proj", "down_proj")):
        read = torch.cat([tokens for name, tokens in first.items() if name.endswith(leaf)])
        found = block["activations"][f"mlp.experts.*.{key}"]
        for state in ("original", "transformed"):
            assert found[state]["kurtosis"]["tensor"] == pytest.approx(kurtosis(read, None, fisher=False), rel=1e-4)
