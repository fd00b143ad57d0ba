"""What a run tells of each layer is what the whole models in Transformers say, whatever happens to the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import WINDOW, Case, files_of, reload
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.linalg import hadamard
from scipy.stats import kurtosis
from torch import Tensor
from transformers import PreTrainedModel

import llmc
from llmc.errors import ConfigError
from llmc.run import Silent

SUBSETS = {
    "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj+mlp.up_proj",
    "mlp.down_proj",
}
TOKENS = 40  # two samples of 16, and a half
GPTQ = {"method": "GPTQ", "quant_out": True}
W8A8 = {
    "weight": {"bit": 8, "symmetric": True, "granularity": "per_channel"},
    "act": {"bit": 8, "symmetric": True, "granularity": "per_token"},
}
OUTLIERS, INJECTED = [5, 23, 58], 2


class Killed(BaseException):
    """The process ends here."""


class Killer(Silent):
    """Ends a run behind a block."""

    def block(self, index: int, row: Mapping[str, Any]) -> None:
        if index == 1:
            raise Killed


def analysed(case: Callable[..., Case], **changes: Any) -> Case:
    return case(**{"report": {"tokens": TOKENS}, **changes})


def found_by(case: Case, *overrides: str) -> dict[str, Any]:
    """What doesn't depend on time and memory of the blocks' rows."""
    case.compress(*overrides)
    return told(case)


def told(case: Case) -> dict[str, Any]:
    metrics = json.loads((case.save_path / "metrics.json").read_text())
    rows = [{key: row[key] for key in ("unit", "layers", "activations")} for row in metrics["blocks"]]
    return {"analysis": metrics["analysis"], "blocks": rows}


def sample(case: Case) -> Tensor:
    """The first samples of the calibration text."""
    words = Path(case.content["calib"]["path"]).read_text().split()
    return torch.tensor([int(word[1:]) + 2 for word in words[:TOKENS]])


def read_by(model: PreTrainedModel, tokens: Tensor, linears: list[str]) -> dict[str, Tensor]:
    """What Linears read of the sample, ``[tokens, in]``, float64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name in linears
    ]
    for window in tokens.split(16):
        model(window[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([part.flatten(0, 1) for part in parts]).double() for name, parts in seen.items()}


@pytest.fixture(scope="module")
def gptq(source_of, texts, tmp_path_factory):
    """A run of GPTQ."""
    from cases import make_case

    made = make_case(source_of("llama"), texts, tmp_path_factory.mktemp("gptq") / "out", **{"report": {"tokens": 40}})
    made.content["quant"] |= GPTQ
    made.compress()
    return made


def test_inputs_and_errors_are_those_of_whole_models(gptq):
    """Blocks in front are the written ones, the block itself is the original: that is what its Linears read."""
    index, names = 2, [name for key in SUBSETS for name in key.split("+")]
    full = [f"model.layers.{index}.{name}" for name in names]
    original, written = reload(gptq.source), reload(gptq.save_path / "fake_quant_model")
    before = read_by(original, sample(gptq), full)
    mixed = reload(gptq.source)
    for block in range(index):
        mixed.model.layers[block].load_state_dict(written.model.layers[block].state_dict())
    behind = read_by(mixed, sample(gptq), full)
    row = told(gptq)["blocks"][index]
    assert set(row["activations"]) == SUBSETS
    for key, found in row["activations"].items():
        first = f"model.layers.{index}.{key.split('+')[0]}"
        for state, tokens in (("original", before[first]), ("transformed", behind[first])):
            told_of = found[state]["kurtosis"]
            channels, by_token = (kurtosis(tokens, axis=axis, fisher=False) for axis in (0, 1))
            assert told_of["tensor"] == pytest.approx(kurtosis(tokens, axis=None, fisher=False), rel=1e-4)
            assert told_of["channel"] == pytest.approx({"mean": channels.mean(), "std": channels.std()}, rel=1e-4)
            assert told_of["token"] == pytest.approx({"mean": by_token.mean(), "std": by_token.std()}, rel=1e-4)
    for name, linear in zip(names, full, strict=True):
        exact, changed = (model.get_submodule(linear).weight.double() for model in (original, written))
        y, y_q = (behind[linear] @ weight.T for weight in (exact, changed))
        layer, error = row["layers"][name], float((y_q - y).square().sum() / y.square().sum())
        assert 10 ** (-layer["sqnr_db"] / 10) == pytest.approx(error, rel=1e-4)
        assert layer["cosine"] == pytest.approx(float((y * y_q).sum() / y.norm() / y_q.norm()), rel=1e-5)
        noise = float((changed - exact).square().sum() / exact.square().sum())
        assert 10 ** (-layer["weight"]["sqnr_db"] / 10) == pytest.approx(noise, rel=1e-4)
        assert layer["weight"]["kurtosis"]["tensor"] == pytest.approx(kurtosis(exact, axis=None, fisher=False), 1e-4)
        assert layer["weight"]["zeros"] == pytest.approx(float((changed == 0).double().mean()), abs=1e-6)
        assert (layer["error_of"], layer["bits"]) == ("calibration", 4 + (16 + 4) / 32)


def rounded(tokens: Tensor) -> Tensor:
    """8 bits, a scale for each token; in float32, as values near the middle between two steps are."""
    values = tokens.float()
    scale = values.abs().amax(-1, keepdim=True) / 127
    return ((values / scale).round().clamp(-128, 127) * scale).double()


@pytest.mark.parametrize(
    ("quant", "rounding"),
    [
        (W8A8, {"q_proj", "k_proj", "v_proj"}),
        ({"mix_bits": {"query": {"layer_name": ["q_proj"], **W8A8}}}, {"q_proj"}),
    ],
)
def test_inputs_are_rounded_for_the_linears_that_round_them(case, quant, rounding):
    """In the first block, whose inputs are the original's."""
    run = analysed(case, quant={**GPTQ, **quant}, save={"save_vllm": False})
    row = found_by(run)["blocks"][0]["layers"]
    original, written = reload(run.source), reload(run.save_path / "fake_quant_model")
    full = {leaf: f"model.layers.0.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")}
    read = read_by(original, sample(run), list(full.values()))
    for leaf, linear in full.items():
        exact, changed = (model.get_submodule(linear).weight.double() for model in (original, written))
        y = read[linear] @ exact.T
        noises = [
            (inputs @ changed.T - y).square().sum() / y.square().sum()
            for inputs in (read[linear], rounded(read[linear]))
        ]
        without, behind = (float(-10 * noise.log10()) for noise in noises)
        assert row[f"self_attn.{leaf}"]["sqnr_db"] == pytest.approx(behind if leaf in rounding else without, abs=1e-3)
        assert abs(behind - without) > 0.02


def test_a_rotation_that_runs_with_the_model_is_in_front_of_what_is_seen(case, exact):
    """And not in front of what the original's Linears read."""
    special = {"Quarot": {"online_rotate": True, "fp32_had": True}}
    act = {"bit": 4, "symmetric": True, "granularity": "per_token"}
    none = {"save_vllm": False, "save_fake": False}
    run = analysed(case, checkpoint=exact("llama"), method=["Quarot", "GPTQ"], save=none)
    run.content["quant"] |= {"special": special, "act": act}
    found = found_by(run)["blocks"][0]["activations"]["mlp.down_proj"]
    tokens = read_by(reload(run.source), sample(run), ["model.layers.0.mlp.down_proj"]).popitem()[1].numpy()
    for state, expected in (("original", tokens), ("transformed", tokens @ hadamard(128) / 128**0.5)):
        assert found[state]["kurtosis"]["tensor"] == pytest.approx(kurtosis(expected, None, fisher=False), rel=1e-3)


def test_surfaces_are_of_the_first_the_middle_and_the_last_block(gptq):
    metrics = json.loads((gptq.save_path / "metrics.json").read_text())
    assert metrics["schema"] == 2 and metrics["analysis"]["surfaces"] == "surfaces.safetensors"
    assert (metrics["analysis"]["text"], metrics["analysis"]["tokens"]) == ("calibration", TOKENS)
    with safe_open(gptq.save_path / "surfaces.safetensors", "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    linears = [f"model.layers.{index}.{key.split('+')[0]}" for index in (0, 2, 3) for key in SUBSETS]
    assert set(tensors) == {f"{name}|{state}" for name in linears for state in ("original", "transformed")}
    assert metadata["tokens"] == str(TOKENS) and json.loads(metadata["channels"]).keys() == tensors.keys()
    for name, tokens in read_by(reload(gptq.source), sample(gptq), linears).items():
        assert json.loads(metadata["channels"])[f"{name}|original"] == tokens.shape[1]
        assert tensors[f"{name}|original"].numpy() == pytest.approx(tokens.abs().float().numpy(), rel=1e-4, abs=1e-5)


def test_a_killed_run_tells_the_same(gptq, case):
    again = analysed(case, quant=GPTQ, base={"checkpoint_every": 1})
    with pytest.raises(Killed):
        llmc.compress(again.content, listener=Killer())
    assert not (again.save_path / "surfaces.safetensors").exists()
    again.compress()
    assert told(again) == told(gptq)
    assert files_of(again.save_path)["surfaces.safetensors"] == files_of(gptq.save_path)["surfaces.safetensors"]
    assert again.written() == gptq.written()


def test_replaying_blocks_and_other_batches_tell_the_same(gptq, case):
    other = analysed(case, quant=GPTQ)
    found = found_by(other, "base.forward=replay")
    assert found == told(gptq)
    batched = analysed(case, quant=GPTQ, calib={"bs": -1})
    first = found_by(batched)["blocks"][0]["activations"]  # behind it, another order of sums may change a code
    assert first == told(gptq)["blocks"][0]["activations"]


def test_without_it_the_same_is_written(gptq, case):
    plain = analysed(case, quant=GPTQ, report={"analysis": False})
    found = found_by(plain)
    assert plain.written() == gptq.written() and not (plain.save_path / "surfaces.safetensors").exists()
    assert found["analysis"] is None and found["blocks"][0]["activations"] == {}
    assert "cosine" not in found["blocks"][0]["layers"]["mlp.up_proj"]


def test_rounding_is_measured_on_the_evaluations_text(case):
    one = analysed(case)
    found = found_by(one)
    layer = found["blocks"][3]["layers"]["mlp.down_proj"]
    assert (found["analysis"]["text"], layer["error_of"], layer["sample_tokens"]) == ("evaluation", "sample", TOKENS)
    assert layer["sqnr_db"] == pytest.approx(-10 * torch.tensor(layer["error"]).log10().item(), rel=1e-4)
    assert TOKENS > WINDOW  # a window is cut


def test_without_a_text_weights_are_looked_at(case):
    found = found_by(analysed(case, eval={"eval_pos": []}, calib=None))
    layer = found["blocks"][0]["layers"]["mlp.up_proj"]
    assert found["analysis"] == {"text": None, "tokens": 0, "outlier_ratio": 6.0, "surfaces": None}
    assert (layer["error_of"], layer["cosine"], layer["sqnr_db"]) == ("weights", None, None)
    assert layer["weight"]["kurtosis"]["tensor"] > 1 and found["blocks"][0]["activations"] == {}
    assert layer["error"] == pytest.approx(10 ** (-layer["weight"]["sqnr_db"] / 10), rel=1e-4)


@pytest.fixture
def injected(source, tmp_path) -> Path:
    """A norm of one block writes some channels 64 times larger; its readers make up for it."""
    folder = shutil.copytree(source, tmp_path / "injected")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.startswith(f"model.layers.{INJECTED}.")]:
            if name.endswith(".input_layernorm.weight"):
                tensors[name][OUTLIERS] = 64.0
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                tensors[name][:, OUTLIERS] /= 64
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_outlier_channels_are_found_where_they_are_and_smoothing_takes_them_away(injected, case):
    smooth = {"method": "SmoothQuant", "special": {"alpha": 0.8}, **W8A8}
    found = found_by(analysed(case, checkpoint=injected, quant=smooth))
    key = "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj"
    counts = {
        (row["unit"], subset): one["original"]["outliers"]["count"]
        for row in found["blocks"]
        for subset, one in row["activations"].items()
        if one["original"]["outliers"]["count"]
    }
    assert counts[f"block-{INJECTED}", key] == len(OUTLIERS)
    one = found["blocks"][INJECTED]["activations"][key]
    worst = one["original"]["outliers"]["worst"]
    assert sorted(entry["channel"] for entry in worst[: len(OUTLIERS)]) == OUTLIERS
    assert worst[0]["ratio"] > 6 and one["original"]["outliers"]["share"] > 0.9
    assert one["transformed"]["outliers"]["count"] == 0
    assert one["transformed"]["kurtosis"]["tensor"] < one["original"]["kurtosis"]["tensor"] / 2


def test_inputs_beyond_a_static_range_are_counted(case):
    """A range of the least squared error leaves some out."""
    static = {**W8A8, "act": {"bit": 8, "symmetric": True, "granularity": "per_tensor", "static": True}}
    static["act"]["calib_algo"] = "static_hist"
    run = analysed(case, quant={"method": "RTN", **static})
    found = found_by(run)
    metrics = json.loads((run.save_path / "metrics.json").read_text())
    key = "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj"
    lo, hi = metrics["blocks"][0]["inputs"][key]
    tokens = read_by(reload(run.source), sample(run), ["model.layers.0.self_attn.q_proj"]).popitem()[1]
    scale = max(-lo, hi) / 127
    beyond = ((tokens > 127.5 * scale) | (tokens < -128.5 * scale)).double().mean()
    one = found["blocks"][0]["activations"][key]
    assert 0 < one["transformed"]["clipped"] == pytest.approx(float(beyond), rel=1e-6)
    assert one["original"]["clipped"] is None


def test_blocks_that_are_not_there_are_refused(case):
    with pytest.raises(ConfigError, match=r"report\.surfaces: 4, but the model's blocks are 0 to 3"):
        analysed(case, report={"surfaces": ["2-4"]}).compress()
    one = analysed(case, report={"surfaces": [1]})
    one.compress()
    with safe_open(one.save_path / "surfaces.safetensors", "pt") as opened:
        assert {name.split(".")[2] for name in opened.keys()} == {"1"}  # noqa: SIM118


def test_each_block_tells_its_time_and_memory(gptq):
    metrics = json.loads((gptq.save_path / "metrics.json").read_text())
    for row in metrics["blocks"]:
        assert {"read", "calibrate", "evaluate", "write", "analyze"} <= row["seconds_by_kind"].keys()
        assert sum(row["seconds_by_kind"].values()) <= row["seconds"] * 1.01 + 0.01
        assert row["memory"]["host"] > 10**7 and row["memory"]["device"] is None
    total = sum(row["seconds_by_kind"]["analyze"] for row in metrics["blocks"])
    assert metrics["seconds_by_kind"]["analyze"] == pytest.approx(total, abs=0.02)
