"""RPTQ as whole runs: what is written is what was evaluated, resumed runs, what clusters are good for, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cases import WINDOW, WINDOWS, reload
from safetensors.torch import load_file, save_file

import llmc
from llmc.cli import main
from llmc.errors import ConfigError, ExportError, ModelError

CLUSTERS = {"R1_clusters": 8, "R2_clusters": 3, "R3_clusters": 3, "R4_clusters": 8, "R5_clusters": 8}
WEIGHT = {"bit": 4, "symmetric": False, "granularity": "per_cluster", "group_size": None}
ACT = {"bit": 4, "symmetric": False, "granularity": "per_cluster", "static": True}
FAMILIES = ["opt", "llama", "llama-tied", "mistral", "qwen2", "qwen3"]


@pytest.fixture
def rptq(case, source_of):
    """A run on a tiny checkpoint; ``act``, ``weight`` and ``special`` are varied."""

    def make(name="opt", act=None, weight=None, special=None, checkpoint=None, **changes):
        quant = {"method": "RPTQ", "weight": WEIGHT | (weight or {}), "special": CLUSTERS | (special or {})}
        quant |= {} if act == 16 else {"act": ACT | (act or {})}
        save = {"save_vllm": False, "save_fake": True}
        changes["save"] = save | changes.get("save", {})
        return case(checkpoint or source_of(name), "RPTQ", quant=quant, **changes)

    return make


def perplexity(result, position="fake_quant"):
    return next(found.value for found in result.perplexities if found.position == position)


def blocks(case):
    return json.loads((case.save_path / "metrics.json").read_text())["blocks"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_written_checkpoint_is_the_evaluated_model(rptq, name):
    """Without quantized activations Transformers' own model of the folder must give the run's perplexity: what is
    reordered cancels out, what a checkpoint can't say is undone."""
    run = rptq(name, act=16)
    result = run.compress()
    model = reload(run.save_path / "fake_quant_model")
    windows = result.perplexities[0].windows
    assert perplexity(result) == pytest.approx(whole_model(model, run, windows), rel=2e-6)
    assert perplexity(result) != pytest.approx(perplexity(result, "pretrain"), rel=1e-4)


@pytest.mark.parametrize("name", ["opt", "qwen3"])
def test_a_finished_run_is_measured_again(rptq, capsys, name):
    """With all that is rounded: no format stores the clusters of activations, the run keeps them beside its numbers."""
    run = rptq(name)
    expected = perplexity(run.compress())
    file = run.save_path / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "evaluation": []}))
    assert main(["eval", *run.arguments]) == 0
    found = {one["position"]: one["value"] for one in json.loads(file.read_text())["evaluation"]}
    assert found["fake_quant"] == expected
    (run.save_path / "clusters.json").write_text('{"schema": 1, "blocks": {}}')
    assert main(["eval", *run.arguments]) == 2
    assert "clusters.json is missing or damaged ('block-0')" in capsys.readouterr().err


def whole_model(model, run, count):
    """Perplexity of the first windows of the evaluation text, by the model as a whole."""
    from transformers import AutoTokenizer

    one = run.content["eval"]
    tokens = AutoTokenizer.from_pretrained(run.source)(Path(one["path"]).read_text(), return_tensors="pt").input_ids
    windows = tokens[:, : count * one["seq_len"]].reshape(count, one["seq_len"])
    losses = torch.stack([model(row[None], labels=row[None]).loss for row in windows])
    return float(losses.double().mean().exp())


@pytest.mark.parametrize("left", [["q_proj", "fc2"], ["self_attn.out_proj", "fc1"]])
def test_ignored_linears_keep_their_weights_and_the_checkpoint_fits_together(rptq, left):
    """Those that follow a norm stand in memory in its new order, and are written in the old one; those behind another
    reordered tensor follow it."""
    run = rptq(act=16, ignored_layers={"layer_names": left})
    result = run.compress()
    model, original = reload(run.save_path / "fake_quant_model"), reload(run.source)
    assert perplexity(result) == pytest.approx(whole_model(model, run, result.perplexities[0].windows), rel=2e-6)
    for name, weight in original.state_dict().items():
        if any(f".{part}.weight" in name for part in left):
            assert torch.equal(model.state_dict()[name].flatten().sort().values, weight.flatten().sort().values), name


class Killed(BaseException):
    """Ends a run as a signal would, behind a block."""


class Fatal:
    """A listener that kills the run behind a block."""

    def __init__(self, after: int) -> None:
        self.after = after

    def started(self, blocks, done) -> None:
        self.done = done

    def block(self, index, row) -> None:
        if index == self.after:
            raise Killed

    def phase(self, text) -> None:
        pass


@pytest.mark.parametrize(("name", "changes"), [("opt", {}), ("llama", {"w_quantizer": "normal"})])
@pytest.mark.parametrize("checkpoint_every", [1, 3])
def test_a_killed_run_ends_with_the_same_bytes_and_perplexity(rptq, name, changes, checkpoint_every):
    base = {"base": {"checkpoint_every": checkpoint_every}}
    calm, killed = (rptq(name, special=changes, **base) for _ in range(2))
    expected = calm.compress()
    for after in (1, 2):
        with pytest.raises(Killed):
            llmc.compress(killed.content, listener=Fatal(after))
    assert perplexity(killed.compress()) == perplexity(expected)  # by the very same ranges
    assert killed.written() == calm.written()


@pytest.fixture
def seen(texts) -> dict:
    """Calibration on what is evaluated, so that no range is too small."""
    return {"path": str(texts["eval"]), "seq_len": WINDOW, "n_samples": WINDOWS}


@pytest.mark.parametrize("name", FAMILIES)
def test_eight_bits_hardly_change_the_model(rptq, name, seen):
    """The whole chain at once: what was calibrated in one place would be far off in another."""
    assert error(rptq(name, act={"bit": 8}, weight={"bit": 8}, special={"metric": "minmax"}, calib=seen)) < 0.01


def error(run) -> float:
    """Of the last block's output on the evaluation text, relative to the original's."""
    run.compress()
    return blocks(run)[-1]["error"]


def test_clusters_help_where_channels_differ(rptq, damaged_opt, seen):
    single = dict.fromkeys(CLUSTERS, 1)
    one, several = (
        rptq(
            checkpoint=damaged_opt,
            special={**special, "metric": "minmax"},
            act={"bit": 6},
            weight={"bit": 8},
            calib=seen,
        )
        for special in (single, {})
    )
    assert error(several) < 0.5 * error(one)


@pytest.fixture
def damaged_opt(source_of, tmp_path):
    """OPT whose norms, values and hidden channels have a few that stand out, as large models have."""
    folder = shutil.copytree(source_of("opt"), tmp_path / "outliers")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(("layer_norm.weight", "layer_norm.bias", "fc1.bias")):
                tensor[[5, 40]] *= 20
            if name.endswith(("k_proj.bias", "v_proj.bias")):
                tensor[[5, 40]] += 5
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_keys_and_values_alone(rptq):
    """Fewer tensors are rounded, so less is lost."""
    some, every = rptq(special={"only_quant_kv": True}), rptq()
    assert error(some) < error(every)


@pytest.mark.parametrize(
    ("changes", "refused", "told"),
    [
        ({"quant": {"method": ["Quarot", "RPTQ"], "special": {}}}, ConfigError, "rotation takes away the differences"),
        ({"quant": {"method": ["Awq", "RPTQ"], "special": {}}}, ConfigError, "Awq doesn't go with RPTQ"),
        ({"sparse": {"method": "Wanda", "weight": {"sparsity": 0.5}}, "quant": {"special": {}}}, ConfigError, "pruned"),
        ({"quant": {"method": "GPTQ", "special": {}}}, ConfigError, "only RPTQ makes clusters"),
        ({"quant": {"kvcache": {"method": "Naive", "bit": 4, "symmetric": False, "granularity": "per_token"}}},
         ConfigError, "quantizes keys and values itself"),
        ({"quant": {"weight": WEIGHT | {"granularity": "per_channel"}}}, ConfigError, r"quant\.weight\.granularity"),
        ({"quant": {"weight": WEIGHT | {"symmetric": True}}}, ConfigError, r"quant\.weight\.symmetric"),
        ({"quant": {"act": ACT | {"static": False}}}, ConfigError, r"quant\.act\.static"),
        ({"quant": {"act": ACT | {"symmetric": True}}}, ConfigError, r"quant\.act\.symmetric"),
        ({"save": {"save_vllm": True}}, ExportError, "no scales per cluster"),
        ({"calib": None}, ConfigError, "RPTQ needs calibration text"),
        ({"eval": {"eval_pos": ["fake_quant_wo_kv"]}}, ConfigError, "fake_quant_wo_kv"),
        ({"eval": {"type": "decode_ppl"}}, ConfigError, "decode_ppl"),
        ({"quant": {"special": {"R6_clusters": 3}}}, ConfigError, "R6_clusters"),
        ({"quant": {"mix_bits": {"fine": {"layer_name": ["fc2"], "weight": WEIGHT | {"bit": 8}}}}},
         ConfigError, r"quant\.mix_bits\.fine: RPTQ has one scheme for all layers"),
        ({"quant": {"method": "RTN", "special": {}, "act": None, "weight": WEIGHT | {"granularity": "per_channel"},
                    "mix_bits": {"fine": {"layer_name": ["fc2"], "weight": WEIGHT}}}},
         ConfigError, r"quant\.mix_bits\.fine\.weight\.granularity: only RPTQ makes clusters"),
    ],
)  # fmt: skip
def test_what_it_cant_do_is_refused_before_a_weight_is_read(rptq, damaged, changes, refused, told):
    for file in damaged.glob("*.safetensors"):
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        file.write_bytes(file.read_bytes()[:header] + b"\xff" * (file.stat().st_size - header))  # all weights NaN
    run = rptq(checkpoint=damaged)
    content = {**run.content}
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values} if values is not None else None
    with pytest.raises(refused, match=told):
        llmc.compress(content)
    assert not run.save_path.exists()


def test_norms_behind_the_branches_are_refused(rptq):
    with pytest.raises(ModelError, match="norms stand behind each branch"):
        rptq("opt-post-norm").compress()


def test_the_plan_counts_scales_and_zero_points_of_clusters(rptq):
    """Weights of 4 bits with 48 bits for each row and cluster; R3 has 3 clusters in each of 4 query heads."""
    run = rptq("llama", eval={"eval_pos": []})
    result = run.compress()
    shapes = {"q": (64, 64, 8), "k": (32, 64, 8), "v": (32, 64, 8), "o": (64, 64, 12)}
    shapes |= {"gate": (128, 64, 8), "up": (128, 64, 8), "down": (64, 128, 8)}
    bits = sum(rows * (columns * 4 + clusters * 48) for rows, columns, clusters in shapes.values())
    weights = sum(rows * columns for rows, columns, _ in shapes.values())
    assert result.metrics["bits_per_weight"] == pytest.approx(bits / weights)
