"""Every supported checkpoint finds its adapter, and no other."""

from __future__ import annotations

import pytest
from torch import nn

from llmc.config.forms import MODEL_TYPES
from llmc.errors import ModelError
from llmc.models import ADAPTERS, find_adapter, heads_of

NAMES = {
    **{"Llama": "llama", "SmolLM": "llama", "Mistral": "mistral", "Opt": "opt", "Bloom": "bloom", "Falcon": "falcon"},
    **{"Qwen": "qwen", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma2": "gemma2", "Phi": "phi", "Phi3": "phi3"},
    **{"ChatGLM": "chatglm", "InternLM2": "internlm2", "MiniCPM": "minicpm", "StableLm": "stablelm"},
    "Starcoder": "starcoder2",
}
SHARED = {"Starcoder", "Gemma3"}  # names of two generations, or of a model with an encoder and its text model


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_an_adapter_is_found_by_model_type(adapter):
    for model_type in adapter.model_types:
        assert find_adapter("auto", model_type) is adapter


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_an_adapter_is_found_by_each_of_its_names(adapter):
    for name in (adapter.name, *adapter.aliases):
        assert find_adapter(name, adapter.model_types[0]) is adapter


@pytest.mark.parametrize(("name", "model_type"), NAMES.items())
def test_the_names_of_llmc_are_known(name, model_type):
    assert model_type in find_adapter(name, model_type).model_types


def test_a_configuration_may_say_every_name():
    assert {name for adapter in ADAPTERS for name in (adapter.name, *adapter.aliases)} <= set(MODEL_TYPES)


def test_no_name_or_model_type_is_given_twice():
    names = [name for adapter in ADAPTERS for name in {adapter.name, *adapter.aliases} - SHARED]
    model_types = [model_type for adapter in ADAPTERS for model_type in adapter.model_types]
    assert len(set(names)) == len(names)
    assert len(set(model_types)) == len(model_types)


@pytest.mark.parametrize("requested", ["auto", "Llama"])
def test_an_unknown_architecture_says_how_to_add_one(requested):
    with pytest.raises(ModelError, match="no adapter for the architecture 'mamba'") as caught:
        find_adapter(requested, "mamba")
    known = caught.value.message.partition("known are ")[2].split("; ")
    assert {"llama, llama4_text", "gemma, gemma2, gemma3, gemma3_text", "opt", "phi, phi3"} <= set(known)
    types = [model_type for adapter in ADAPTERS for model_type in adapter.model_types]
    assert sorted(", ".join(known).split(", ")) == sorted(types)
    assert len(known) < len(types)
    assert "ADAPTERS in llmc/models/registry.py" in caught.value.remedy


def test_a_name_for_another_architecture_is_refused():
    with pytest.raises(ModelError, match=r"model\.type is 'Opt', but the checkpoint is a 'llama' model") as caught:
        find_adapter("Opt", "llama")
    assert "'Llama'" in caught.value.remedy


def test_the_subsets_name_every_linear_of_a_block_once(tiny):
    block = tiny.skeleton().blocks[0]
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    named = [name for subset in tiny.subsets for name in subset.linears]
    assert sorted(named) == sorted(linears)


def test_the_subsets_name_modules_that_exist(tiny):
    block = tiny.skeleton().blocks[0]
    for subset in tiny.subsets:
        inspected = block.get_submodule(subset.inspect)
        held = dict(inspected.named_modules()).values()
        assert all(any(block.get_submodule(name) is module for module in held) for name in subset.linears)
        assert subset.prev is None or hasattr(block.get_submodule(subset.prev), "weight")


def test_post_norms_absorb_nothing(checkpoint):
    absorbing = {name: [s.prev for s in checkpoint(name).subsets] for name in ("opt", "opt-post-norm")}
    assert absorbing["opt"] == ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"]
    assert absorbing["opt-post-norm"] == [None, "self_attn.v_proj", None, "fc1"]


def test_the_heads_fit_the_projections(tiny):
    heads = heads_of(tiny.config)
    block = tiny.skeleton().blocks[0]
    if tiny.name == "gpt2":
        assert block.attn.c_attn.out_features == (heads.query + 2 * heads.kv) * heads.dim
        return
    attention = block.self_attn
    assert attention.q_proj.out_features == heads.query * heads.dim
    assert attention.k_proj.out_features == heads.kv * heads.dim
