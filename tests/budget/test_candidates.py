"""Which layers share a scheme, what a choice is in YAML, and what of a file is refused as it's read."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from llmc.algorithms import Ignored, LayerPattern, Recipe, Rule
from llmc.budget.candidates import Candidate, choose, make_groups, settings
from llmc.budget.sensitivity import LayerSensitivity, Sensitivity, Trial, most_sensitive
from llmc.config import load_config
from llmc.config.budget import candidate_weights
from llmc.config.places import layer_place
from llmc.config.tensors import WeightConfig
from llmc.errors import ConfigError
from llmc.export import Layer
from llmc.models import Subset
from llmc.models.mixture import mixture_subsets
from llmc.quant import PerGroup, QuantSpec, Scheme

G64 = {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 64}


def spec(bits: int) -> QuantSpec:
    return QuantSpec(bits, False, PerGroup(64), scale_dtype=torch.bfloat16)


def layers_of(subsets, blocks, grid=None):
    return [
        Layer(
            f"model.layers.{block}.{name}",
            128,
            64,
            grid or spec(4),
            tuple(f"model.layers.{block}.{other}" for other in subset.fused_with(name)),
        )
        for block in range(blocks)
        for subset in subsets
        for name in subset.linears
    ]


ATTENTION = Subset(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None, "self_attn")
OUT = Subset(("self_attn.o_proj",), None, "self_attn.o_proj")
DENSE = (ATTENTION, OUT)
MIXTURE = (*DENSE, *mixture_subsets(3, prev=None, shared="mlp.shared_expert"))


def recipe(*rules) -> Recipe:
    return Recipe((), spec(4), Ignored(), rules=tuple(rules))


def kinds(groups):
    return [(group.block, tuple(member.kind for member in group.members)) for group in groups]


def test_what_is_fused_is_one_group_and_so_are_all_experts():
    groups = make_groups(layers_of(MIXTURE, 2), [MIXTURE] * 2, recipe())
    experts = tuple(f"mlp.experts.{n}.{leaf}" for n in range(3) for leaf in ("gate_proj", "up_proj"))
    experts += tuple(f"mlp.experts.{n}.down_proj" for n in range(3))
    shared = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    own = [ATTENTION.linears, OUT.linears, experts, shared, ("mlp.shared_expert.down_proj",)]
    assert sorted(kinds(groups)) == sorted((block, names) for block in (0, 1) for names in own)


def test_what_a_setting_fixed_or_nobody_quantizes_is_in_no_group():
    layers = layers_of(DENSE, 2)
    layers[3] = Layer(layers[3].name, 128, 64, None, layers[3].fused)
    fixed = Rule("one", (LayerPattern("k_proj#1", "k_proj", frozenset({1})),), Scheme(spec(8)))
    groups = make_groups(layers, [DENSE] * 2, recipe(fixed))
    rest = ("self_attn.q_proj", "self_attn.v_proj")
    assert kinds(groups) == [(0, ATTENTION.linears), (1, rest), (1, OUT.linears)]


def test_a_choice_in_yaml_means_the_same_layers():
    """Read back by the code that reads settings, every layer has the candidate that was chosen for it."""
    groups = make_groups(layers_of(MIXTURE, 6), [MIXTURE] * 6, recipe())
    quant = load_config({"model": {"path": "m"}, "quant": {"method": "RTN", "weight": G64}}).config.quant
    candidates = [Candidate(f"W{bits} g64", WeightConfig(**{**G64, "bit": bits}), spec(bits)) for bits in (2, 3, 8)]
    choice = [(7 * index + index // 3) % 3 for index in range(len(groups))]
    found = settings(quant, groups, candidates, choice)
    again = load_config({"model": {"path": "m"}, "quant": {"method": "RTN", "weight": G64, "mix_bits": found}})
    assert {name: one.weight.bit for name, one in again.config.quant.mix_bits.items()} == {
        "budget_w2_g64": 2,
        "budget_w3_g64": 3,
        "budget_w8_g64": 8,
    }
    for group, index in zip(groups, choice, strict=True):
        for member in group.members:
            meant = []
            for name, setting in found.items():
                places = [layer_place(text) for text in setting["layer_name"]]
                patterns = (LayerPattern("", place.name, place.blocks) for place in places)
                meant += [name] * sum(pattern.covers(group.block, member.kind) for pattern in patterns)
            assert meant == [f"budget_w{(2, 3, 8)[index]}_g64"]


@pytest.mark.parametrize("budget", [2.3, 2.9, 3.7, 5.1, 7.8])
def test_the_budget_is_of_all_quantized_layers(budget):
    """Against all choices; one layer outside of the groups takes 8 bits of it."""
    layers = layers_of(DENSE, 3)
    fixed = Rule("one", (LayerPattern("o_proj#2", "o_proj", frozenset({2})),), Scheme(spec(2)))
    layers[-1] = Layer(layers[-1].name, 128, 64, spec(2), layers[-1].fused)
    groups = make_groups(layers, [DENSE] * 3, recipe(fixed))
    specs = [spec(bits) for bits in (2, 4, 8)]
    losses = [[4.0 / (1 + index), 1.0 / (2 + index), 0.1 * index] for index in range(len(groups))]
    choice = choose(groups, specs, losses, layers, budget)

    def size(taken) -> float:
        own = sum(
            group.weights * (specs[i].bits + (16 + specs[i].bits) / 64) for group, i in zip(groups, taken, strict=True)
        )
        return (own + 128 * 64 * (2 + 18 / 64)) / sum(one.rows * one.columns for one in layers)

    def loss(taken) -> float:
        return sum(row[i] for row, i in zip(losses, taken, strict=True))

    fitting = [taken for taken in product(range(3), repeat=len(groups)) if size(taken) <= budget]
    assert size(choice) <= budget
    assert loss(choice) == pytest.approx(min(map(loss, fitting)))


def test_a_budget_that_is_exactly_a_uniform_size_is_in_range():
    groups = make_groups(layers_of(DENSE, 3), [DENSE] * 3, recipe())
    nothing = [[0.0]] * len(groups)
    assert choose(groups, [spec(3)], nothing, layers_of(DENSE, 3), 3 + 19 / 64) == [0] * len(groups)
    with pytest.raises(ConfigError, match=r"2\.28125 bits per weight.* from 3\.2969 to 3\.2969"):
        choose(groups, [spec(3)], nothing, layers_of(DENSE, 3), 2.28125)


def quant(**mix_bits):
    return {"model": {"path": "m"}, "quant": {"method": "RTN", "weight": G64, "mix_bits": mix_bits}}


def test_a_budget_beside_settings_is_read_and_loading_the_result_again_gives_the_same():
    one = {"layer_name": ["down_proj"], "do_quant": False}
    loaded = load_config(quant(budget=4, candidates=[{"bit": 2}, {"bit": 8, "group_size": 32}], one=one))
    section = loaded.config.quant
    assert section.bit_budget.bits == 4.0
    assert list(section.mix_bits) == ["one"]
    assert load_config(loaded.resolved).config == loaded.config


def test_a_candidate_is_quant_weight_but_for_what_it_says():
    base = WeightConfig(**G64, scale_dtype="float32")
    asked = load_config(
        quant(
            budget=4,
            candidates=[
                {"bit": 2},
                {"bit": 3, "group_size": 32},
                {"bit": 8, "symmetric": True, "granularity": "per_channel"},
                {"bit": "mxfp4"},
                {"bit": "e4m3", "granularity": "per_tensor"},
            ],
        )
    ).config.quant.bit_budget
    found = [
        (one.bit, one.symmetric, one.granularity, one.group_size, one.scale_dtype)
        for one in candidate_weights(base, asked.candidates)
    ]
    assert found == [
        (2, False, "per_group", 64, "float32"),
        (3, False, "per_group", 32, "float32"),
        (8, True, "per_channel", None, "float32"),
        ("mxfp4", True, "per_group", 32, "float32"),
        ("e4m3", True, "per_tensor", None, "float32"),
    ]


@pytest.mark.parametrize(
    ("mix_bits", "said"),
    [
        ({"budget": "4.25"}, "quant.mix_bits.budget: '4.25' is not a number; remove the quotes"),
        ({"budget": -1}, "quant.mix_bits.budget: -1 is too small"),
        ({"candidates": [{"bit": 2}, {"bit": 3}]}, "goes with a budget"),
        ({"from": "file.json"}, "goes with a budget"),
        ({"budget": 4, "candidates": [{"bit": 2}]}, "candidates: at least two"),
        ({"budget": 4, "candidates": [{"bit": 2}, {"bits": 3}]}, "did you mean 'bit'"),
        ({"budget": 4, "candidates": [{"bit": 2}, {"bit": 99}]}, "99 is not in 2..16"),
        ({"budget": 4, "candidates": [{"bit": 4}, {"bit": 4, "symmetric": False}]}, "entry 1 is the same"),
        (
            {"budget": 4, "candidates": [{"bit": 4}, {"bit": "e4m3", "symmetric": False}]},
            "entry 1, symmetric: e4m3 has no zero point",
        ),
        ({"budget": 4, "one": {"layer_name": ["down_proj"]}}, "quant.mix_bits.one"),
    ],
)
def test_what_is_wrong_is_named(mix_bits, said):
    with pytest.raises(ConfigError) as error:
        load_config(quant(**mix_bits))
    assert said in str(error.value)


def test_a_budget_needs_weights_to_vary():
    with pytest.raises(ConfigError, match="varies its bits"):
        load_config({"model": {"path": "m"}, "quant": {"method": "RTN", "mix_bits": {"budget": 4}}})


def layer(name, block, together, losses, rows=10):
    trials = tuple(Trial(loss, loss / 2, 4.0) for loss in losses)
    return LayerSensitivity(f"model.layers.{block}.{name}", block, name, rows, 10, 2.0, together, trials)


SENSED = Sensitivity(
    {"path": "m", "headers": "abc"},
    {"method": ["RTN"], "tokens": 7},
    ({"name": "W2", "weight": {"bit": 2}}, {"name": "W4", "weight": {"bit": 4}}),
    (
        layer("experts.0.up", 0, 0, (3.0, 1.0)),
        layer("experts.1.up", 0, 0, (5.0, 2.0)),
        layer("o_proj", 0, 1, (1.0, 0.5)),
        layer("o_proj", 1, 2, (9.0, 4.0), rows=100),
    ),
)


def test_a_sensitivity_is_what_its_file_says_and_has_a_table_for_plots():
    plain = SENSED.to_dict()
    assert Sensitivity.from_dict(plain) == SENSED
    assert plain["table"] == {
        "blocks": [0, 1],
        "kinds": ["experts.*.up", "o_proj"],
        "loss": {"W2": [[8.0, None], [1.0, 9.0]], "W4": [[3.0, None], [0.5, 4.0]]},
    }


def test_most_sensitive_per_weight_come_first():
    names = [name for name, _ in most_sensitive(SENSED)]
    assert names == ["block 0: experts.*.up", "block 0: o_proj", "block 1: o_proj"]
    assert [trial.loss for trial in dict(most_sensitive(SENSED))["block 0: experts.*.up"]] == [8.0, 3.0]


def test_a_group_has_its_worst_error_and_the_bits_of_all_its_weights():
    large = LayerSensitivity("a", 0, "experts.0.up", 30, 10, 2.0, 0, (Trial(1.0, 0.2, 4.5), Trial(1.0, 0.1, 8.5)))
    small = LayerSensitivity("b", 0, "experts.1.up", 10, 10, 2.0, 0, (Trial(1.0, 0.3, 4.9), Trial(1.0, 0.05, 8.9)))
    ((_, trials),) = most_sensitive(replace(SENSED, layers=(large, small)))
    assert [(one.error, one.bits) for one in trials] == [(0.3, pytest.approx(4.6)), (0.1, pytest.approx(8.6))]


def test_each_candidate_counts_alike_for_the_order():
    """2 bits cost a hundred times more; by the sum of losses the first layer would be the most sensitive one."""
    layers = (layer("q_proj", 0, 0, (110.0, 0.1)), layer("o_proj", 0, 1, (90.0, 0.9)))
    assert [name for name, _ in most_sensitive(replace(SENSED, layers=layers))] == [
        "block 0: o_proj",
        "block 0: q_proj",
    ]
