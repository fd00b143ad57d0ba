"""Which lists of methods make sense, in what order, and which weights they touch."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from llmc.algorithms import Ignored, make_recipe
from llmc.algorithms.awq import Awq, AwqOptions
from llmc.algorithms.gptq import GPTQOptions
from llmc.algorithms.osplus import OsPlus
from llmc.algorithms.rtn import RTN, RTNOptions
from llmc.algorithms.smoothquant import SmoothQuant
from llmc.errors import ConfigError
from llmc.models import Subset
from llmc.quant import PerChannel, QuantSpec, Sparsity

SPEC = QuantSpec(4, True, PerChannel())
HALF = Sparsity(0.5)


def recipe(
    *methods: str,
    spec: QuantSpec | None = SPEC,
    ignored: Ignored | None = None,
    quant_out: bool | None = None,
    sparsity: Sparsity | None = HALF,
    sparsity_out: bool | None = None,
):
    outs = {"quant_out": quant_out, "sparsity_out": sparsity_out}
    return make_recipe(methods, {}, spec, ignored or Ignored(), sparsity=sparsity, **outs)


@pytest.mark.parametrize(
    ("methods", "steps"),
    [
        (["RTN"], ["RTN"]),
        (["GPTQ"], ["GPTQ"]),
        (["Awq"], ["Awq", "RTN"]),
        (["Awq", "GPTQ"], ["Awq", "GPTQ"]),
        (["Awq", "RTN"], ["Awq", "RTN"]),
        (["Quarot"], ["Quarot", "RTN"]),
        (["Quarot", "Awq", "GPTQ"], ["Quarot", "Awq", "GPTQ"]),
        ([], ["RTN"]),
        (["Wanda"], ["Wanda", "RTN"]),
        (["Awq", "Magnitude"], ["Awq", "Magnitude", "RTN"]),
        (["Awq", "SparseGPT", "GPTQ"], ["Awq", "SparseGPT", "GPTQ"]),
    ],
)
def test_a_recipe_ends_with_one_quantizer(methods, steps):
    assert [step.algorithm.name for step in recipe(*methods).steps] == steps


@pytest.mark.parametrize(
    ("methods", "problem", "remedy"),
    [
        (["GPTQ", "Awq"], "GPTQ must come last", "['Awq', 'GPTQ']"),
        (["GPTQ", "RTN"], "two weight quantizers, GPTQ and RTN", "['GPTQ']"),
        (["Awq", "RTN", "GPTQ"], "two weight quantizers, RTN and GPTQ", "['Awq', 'RTN']"),
        (["Awq", "Quarot", "GPTQ"], "Quarot must come first", "['Quarot', 'Awq', 'GPTQ']"),
        (["Awq", "Awq"], "names a method twice", "once"),
        (["Wanda", "SparseGPT"], "two pruners, Wanda and SparseGPT", "['Wanda']"),
        (["Awq", "Wanda", "SparseGPT", "GPTQ"], "two pruners", "['Awq', 'Wanda', 'GPTQ']"),
        (["GPTQ", "Wanda"], "GPTQ must come last", "['Wanda', 'GPTQ']"),
        (["Wanda", "Awq", "GPTQ"], "Wanda must come behind the transforms", "['Awq', 'Wanda', 'GPTQ']"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused_with_one_that_does(methods, problem, remedy):
    with pytest.raises(ConfigError) as error:
        recipe(*methods)
    assert problem in error.value.message
    assert remedy in error.value.remedy


def test_a_quantizer_needs_a_grid():
    with pytest.raises(ConfigError, match=r"quant\.weight is missing"):
        recipe("GPTQ", spec=None)


@pytest.mark.parametrize("methods", [("Awq", "Wanda"), ("Wanda", "GPTQ"), ("Awq",)])
def test_only_a_pruner_alone_does_without_a_grid(methods):
    assert [step.algorithm.name for step in recipe("Wanda", spec=None).steps] == ["Wanda"]
    with pytest.raises(ConfigError, match=r"quant\.weight is missing"):
        recipe(*methods, spec=None)


def test_a_pruner_needs_a_sparsity_and_nothing_else_has_one():
    with pytest.raises(ConfigError, match="Wanda prunes, but nothing says how much"):
        recipe("Wanda", sparsity=None)
    assert recipe("Wanda").sparsity_of(0, "fc", "layers.0.fc") == Sparsity(0.5)
    assert recipe("Wanda", ignored=Ignored(blocks=frozenset({0}))).sparsity_of(0, "fc", "layers.0.fc") is None
    assert recipe("RTN").sparsity_of(0, "fc", "layers.0.fc") is None


@pytest.mark.parametrize(
    ("methods", "sparsity_out", "original", "compressed"),
    [
        (["Magnitude"], None, False, False),
        (["Wanda"], None, False, True),
        (["Wanda"], False, True, False),
        (["SparseGPT"], None, False, True),
        (["SparseGPT", "GPTQ"], False, True, True),
        (["Awq", "Wanda"], None, True, True),
    ],
)
def test_sparsity_out_chooses_the_stream_of_the_pruner_alone(methods, sparsity_out, original, compressed):
    made = recipe(*methods, sparsity_out=sparsity_out)
    assert (made.original_stream, made.compressed_stream) == (original, compressed)


def test_options_reach_their_method():
    made = make_recipe(["Awq", "GPTQ"], {"GPTQ": GPTQOptions(percdamp=0.5)}, SPEC, Ignored(), quant_out=None)
    assert made.steps[1].algorithm.options.percdamp == 0.5


@pytest.mark.parametrize(
    ("methods", "quant_out", "original", "compressed"),
    [
        (["RTN"], None, False, False),
        (["RTN"], True, False, False),
        (["GPTQ"], None, False, True),
        (["GPTQ"], False, True, False),
        (["Awq"], None, True, False),
        (["Awq"], True, False, True),
        (["Awq", "GPTQ"], None, True, True),
        (["Awq", "GPTQ"], False, True, False),
        (["Awq", "GPTQ"], True, False, True),
        (["Quarot"], None, False, False),
        (["Quarot", "Awq"], None, True, False),
    ],
)
def test_only_streams_that_a_step_reads_are_asked_for(methods, quant_out, original, compressed):
    made = recipe(*methods, quant_out=quant_out)
    assert (made.original_stream, made.compressed_stream) == (original, compressed)
    assert made.needs_data == (original or compressed)


@pytest.mark.parametrize(
    ("ignored", "covered"),
    [
        (Ignored(), []),
        (Ignored(layers=frozenset({"down_proj"})), [(0, "mlp.down_proj"), (1, "mlp.down_proj")]),
        (Ignored(layers=frozenset({"mlp.down_proj"})), [(0, "mlp.down_proj"), (1, "mlp.down_proj")]),
        (Ignored(layers=frozenset({"n_proj"})), []),  # whole names only
        (Ignored(layers=frozenset({"down_proj"}), blocks=frozenset({1})), [(1, "mlp.down_proj")]),
        (Ignored(blocks=frozenset({0})), [(0, "mlp.down_proj"), (0, "mlp.up_proj")]),
        (Ignored(full_names=frozenset({"model.layers.1.mlp.up_proj"})), [(1, "mlp.up_proj")]),
    ],
)
def test_ignored_linears_have_no_grid(ignored, covered):
    made = recipe("RTN", ignored=ignored)
    without = [
        (block, name)
        for block in (0, 1)
        for name in ("mlp.down_proj", "mlp.up_proj")
        if made.spec_of(block, name, f"model.layers.{block}.{name}") is None
    ]
    assert without == covered
    assert ignored.asked == (ignored != Ignored())


QKV = Subset(("self_attn.q_proj", "self_attn.k_proj"), "norm", "self_attn")
DOWN = Subset(("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj", reads="ffn")


@pytest.mark.parametrize(
    ("kind", "options", "covered"),
    [
        (Awq, {}, [QKV, DOWN]),
        (Awq, {"layers": "down_proj"}, [DOWN]),
        (Awq, {"layers": ["mlp.down_proj"]}, [DOWN]),
        (Awq, {"layers": ["q_proj", "k_proj"]}, [QKV]),
        (Awq, {"layers": ["proj"]}, []),  # the last part of a name, not of a word
        (SmoothQuant, {}, [QKV]),
        (OsPlus, {}, [QKV]),
        (OsPlus, {"layers": ["down_proj"]}, []),
    ],
)
def test_a_transform_is_limited_to_the_linears_that_are_named(kind, options, covered):
    algorithm = kind(kind.options_type(**options))
    assert [subset for subset in (QKV, DOWN) if algorithm.covers(subset)] == covered
    assert RTN(RTNOptions()).covers(QKV)


@pytest.mark.parametrize("layers", [[], [3], 3, {"down_proj": True}])
def test_layers_are_names(layers):
    with pytest.raises(ValidationError, match="layers"):
        AwqOptions(layers=layers)
