"""ShortGPT: the influences are those of the whole model, and the written one is the original without some blocks."""

from __future__ import annotations

import json
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from cases import reload
from test_pipeline import FAKE, TRANS, VLLM, evaluation_windows, perplexities, same_logits, tensors_of
from torch import nn
from transformers import AutoTokenizer

import llmc
from llmc.algorithms import BlockInfluence, least_influential
from llmc.cli import main
from llmc.models import BlockSelection
from llmc.run import Silent
from llmc.stream.headers import read_headers
from llmc.stream.source import BlockSource

DROP2 = {"method": "ShortGPT", "weight": {"n_prune_layers": 2}}
PLAIN = {"quant": None, "save": {"save_vllm": False, "save_trans": True}}


class Killed(BaseException):
    pass


class Fatal(Silent):
    """Kills the run at a phase, or behind a block."""

    def __init__(self, phase=None, block=None):
        self._phase, self._block = phase, block

    def phase(self, text):
        if text == self._phase:
            raise Killed

    def block(self, index, row):
        if index == self._block:
            raise Killed


@torch.no_grad()
def whole_model_influences(run) -> list[float]:
    """From Transformers' hidden states, in float64; the last block's output is taken before the final norm."""
    model = reload(run.source).double()
    calib = run.content["calib"]
    with open(calib["path"]) as file:
        ids = AutoTokenizer.from_pretrained(run.source)(file.read(), add_special_tokens=False)["input_ids"]
    last = []
    inner = model.get_decoder()
    inner.layers[-1].register_forward_hook(lambda module, args, output: last.append(output))
    cosines = []
    for index in range(calib["n_samples"]):
        window = torch.tensor(ids[index * calib["seq_len"] :][: calib["seq_len"]])[None]
        states = model(input_ids=window, output_hidden_states=True, use_cache=False).hidden_states
        states = [*states[:-1], last[-1][0] if isinstance(last[-1], tuple) else last[-1]]
        pairs = pairwise(states)
        cosines.append(torch.stack([nn.functional.cosine_similarity(x, y, dim=-1).flatten() for x, y in pairs]))
    return (1 - torch.cat(cosines, dim=1).mean(dim=1)).tolist()


def without(model: nn.Module, dropped: list[int]) -> nn.Module:
    """Transformers' model with blocks taken out by hand."""
    inner = model.get_decoder()
    inner.layers = nn.ModuleList(block for index, block in enumerate(inner.layers) if index not in dropped)
    inner.config.num_hidden_layers = len(inner.layers)
    if getattr(inner.config, "layer_types", None):
        inner.config.layer_types = [t for i, t in enumerate(inner.config.layer_types) if i not in dropped]
    return model


@torch.no_grad()
def logits(model, windows):
    return model(input_ids=windows, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "opt"])
def test_the_least_influential_blocks_are_gone_and_the_rest_computes_the_same(case, source_of, family):
    run = case(source_of(family), sparse=DROP2, **PLAIN)
    result = run.compress()
    found, expected = result.metrics["blocks_dropped"], whole_model_influences(run)
    assert found["influence"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found["dropped"] == sorted(sorted(range(4), key=lambda index: expected[index])[:2])
    windows = evaluation_windows(run)
    by_hand = logits(without(reload(run.source), found["dropped"]), windows)
    for folder in (FAKE, TRANS):
        smaller = reload(run.save_path / folder)
        assert smaller.config.num_hidden_layers == len(smaller.get_decoder().layers) == 2
        assert torch.equal(logits(smaller, windows), by_hand)
    losses = [nn.functional.cross_entropy(y[:-1], ids[1:]) for y, ids in zip(by_hand, windows, strict=True)]
    measured = perplexities(result)
    assert measured["fake_quant"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert measured["fake_quant"] != pytest.approx(measured["pretrain"], rel=1e-3)


def test_the_original_is_evaluated_with_all_its_blocks(case):
    run, plain = case(sparse=DROP2, **PLAIN), case(eval={"eval_pos": ["pretrain"]})
    assert perplexities(run.compress())["pretrain"] == perplexities(plain.compress())["pretrain"]


def test_a_quantizer_behind_it_sees_and_writes_the_smaller_model(case, tmp_path):
    """As if the smaller model had been written first and then quantized."""
    both = case(method="GPTQ", sparse=DROP2)
    both.compress()
    assert same_logits(both, VLLM, FAKE)
    first = case(sparse=DROP2, **PLAIN)
    first.compress()
    second = case(first.save_path / TRANS, method="GPTQ")
    second.compress()
    left, right = tensors_of(both.save_path / VLLM), tensors_of(second.save_path / VLLM)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    configs = [json.loads((one.save_path / VLLM / "config.json").read_text()) for one in (both, second)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["num_hidden_layers"] == configs[1]["num_hidden_layers"] == 2


def test_mixed_and_ignored_layers_keep_the_original_numbers(case):
    eight = {"bit": 8, "symmetric": True, "granularity": "per_channel"}
    run = case(sparse=DROP2, ignored_layers={"block_ids": [1, 2]}, quant={
        "mix_bits": {"down": {"layer_name": ["down_proj#0", "o_proj#3"], "weight": eight}}
    })  # fmt: skip
    result = run.compress()
    assert result.metrics["blocks_dropped"]["dropped"] == [0, 3]  # the others are to stay as they are
    original, written = tensors_of(run.source), tensors_of(run.save_path / FAKE)
    for new, old in enumerate((1, 2)):
        for name in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm"):
            stored = written[f"model.layers.{new}.{name}.weight"]
            assert torch.equal(stored.float(), original[f"model.layers.{old}.{name}.weight"].float())


def test_each_weight_is_read_once_a_pass(case, monkeypatch):
    run = case(method="GPTQ", sparse=DROP2, eval={"eval_pos": ["fake_quant"]})
    reads = []
    original = BlockSource._read
    monkeypatch.setattr(BlockSource, "_read", lambda self, unit: reads.append(unit) or original(self, unit))
    metrics = run.compress().metrics
    dropped = {f"block-{index}" for index in metrics["blocks_dropped"]["dropped"]}
    blocks = [f"block-{index}" for index in range(4)]
    # Nobody needs the dropped ones a second time.
    expected = ["embed", *blocks, "embed", *(unit for unit in blocks if unit not in dropped), "head"]
    assert sorted(reads) == sorted(expected)
    entries = read_headers(run.source)
    head = sum(entries[name].nbytes for name in ("model.norm.weight", "lm_head.weight"))
    gone = sum(e.nbytes for n, e in entries.items() if any(f"layers.{unit[6:]}." in n for unit in dropped))
    assert metrics["bytes_read"] == 2 * metrics["model"]["bytes"] - head - gone


@pytest.mark.parametrize(
    "fatal", [{"phase": "survey of block 2/4"}, {"phase": "survey of block 4/4"}, {"phase": "head"}, {"block": "last"}]
)
def test_killed_in_either_pass_and_resumed_it_writes_the_same_bytes(case, fatal):
    plain, killed = (case(method="GPTQ", sparse=DROP2, base={"checkpoint_every": 1}) for _ in range(2))
    expected = plain.compress()
    kept = [index for index in range(4) if index not in expected.metrics["blocks_dropped"]["dropped"]]
    fatal = {"block": kept[-1]} if fatal == {"block": "last"} else fatal
    with pytest.raises(Killed):
        llmc.compress(killed.content, listener=Fatal(**fatal))
    result = killed.compress()
    assert perplexities(result) == perplexities(expected)
    assert result.metrics["blocks_dropped"] == expected.metrics["blocks_dropped"]
    assert killed.written() == plain.written()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sparse": {**DROP2, "weight": {"n_prune_layers": 4}}}, ["n_prune_layers: 4", "has 4 blocks", "most is 3"]),
        ({"sparse": DROP2, "ignored_layers": {"block_ids": ["0-2"]}}, ["3 of which ignored_layers", "most is 1"]),
        ({"sparse": {**DROP2, "weight": {"sparsity": 0.5}}}, ["ShortGPT needs n_prune_layers"]),
        ({"sparse": {**DROP2, "sparsity_out": True}}, ["sparsity_out", "no use"]),
        ({"sparse": {**DROP2, "special": {"alphas": 1}}}, ["alphas"]),
        ({"sparse": DROP2, "calib": None}, ["ShortGPT needs calibration text"]),
        ({"method": "ShortGPT"}, ["ShortGPT prunes", "n_prune_layers"]),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(case, capsys, monkeypatch, changes, said):
    run = case(**changes)
    monkeypatch.setattr(BlockSource, "_read", lambda self, unit: pytest.fail(f"{unit} is read"))
    assert main(run.arguments) == 2
    message = capsys.readouterr().err
    assert [part for part in said if part not in message] == [], message
    assert not run.save_path.exists()


def test_the_plan_and_the_summary_tell_of_it(case, capsys):
    run = case(sparse=DROP2)
    assert main([*run.arguments, "--dry-run"]) == 0
    assert "2 blocks, which ones the run finds out" in capsys.readouterr().out
    assert main(run.arguments) == 0
    assert "2 of 4 kept" in capsys.readouterr().out


def test_influence_is_one_minus_the_mean_cosine():
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [5.0, 0.0]])
    influence = BlockInfluence()
    influence.update(x[:1], y[:1])
    influence.update(x[1:], y[1:])
    assert influence.value == pytest.approx(0.5)  # one token keeps its direction, one is turned by 90 degrees


def test_of_equal_blocks_the_first_goes_and_protected_ones_stay():
    assert least_influential([0.3, 0.1, 0.2, 0.1], 2) == {1, 3}
    assert least_influential([0.1, 0.1, 0.1], 1) == {0}
    assert least_influential([0.3, 0.1, 0.2, 0.1], 2, protected=[1]) == {2, 3}
    with pytest.raises(ValueError, match="3 of 2 blocks"):
        least_influential([0.1, 0.2, 0.3], 3, protected=[0])


def test_names_are_those_of_the_smaller_model_and_back():
    selection = BlockSelection(12, "model.decoder.layers", frozenset({0, 3, 10}))
    names = {"decoder.layers.1.fc1.weight": "decoder.layers.0.fc1.weight",
             "model.layers.11.mlp.experts.4.down_proj.weight": "model.layers.8.mlp.experts.4.down_proj.weight",
             "model.norm.weight": "model.norm.weight"}  # fmt: skip
    for old, new in names.items():
        assert (selection.renamed(old), selection.original(new)) == (new, old)
    assert not selection.keeps("model.layers.3.fc1.weight")


def test_per_block_lists_of_the_configuration_shrink(checkpoint):
    from transformers import Qwen2Config

    model = Qwen2Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    content = {"num_hidden_layers": 4, "max_window_layers": 2, "hidden_size": 1}
    before = deepcopy(content)
    smaller = BlockSelection(4, "model.layers", frozenset({1, 2})).config(content, model)
    assert content == before
    assert smaller == {
        "num_hidden_layers": 2,
        "max_window_layers": 1,
        "hidden_size": 1,
        "layer_types": [model.layer_types[0], model.layer_types[3]],
    }
    assert model.layer_types[0] != model.layer_types[3]
    nested = BlockSelection(4, "model.layers", frozenset({1})).config({"text_config": dict(content)}, model)
    assert nested["text_config"]["num_hidden_layers"] == 3
    assert "num_hidden_layers" not in nested
