"""A rotated model computes what it did, whole and in exact arithmetic; what can't be rotated is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exact import CONFIGS, change, model_of, subsets_of
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmc.errors import ModelError
from llmc.linalg import OnlineRotation, hadamard, make_rotation
from llmc.models import (
    ADAPTERS,
    find_adapter,
    fold_scale,
    heads_of,
    residual_of,
    rotate_block,
    rotate_embedding,
    rotate_head,
    scale_rule,
)


def variant(name: str, **changes: object) -> PretrainedConfig:
    """One of the tiny configs with two blocks and some changes."""
    told = {key: value for key, value in CONFIGS[name].to_dict().items() if key != "layer_types"}  # of one block
    return type(CONFIGS[name])(**{**told, "num_hidden_layers": 2, **changes})


EVERY = {name: variant(name) for name in CONFIGS if name != "opt-post-norm"} | {
    "llama-tied": variant("llama-gqa", tie_word_embeddings=True),
    "qwen3-tied": variant("qwen3", tie_word_embeddings=True),
    "opt-untied": variant("opt", tie_word_embeddings=False),
    "opt-without-biases": variant("opt", enable_bias=False),
}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1)), use_cache=False).logits


@torch.no_grad()
def rotate(
    model: PreTrainedModel, seed: int = 0, *, random: bool = False, online: OnlineRotation | None = None
) -> None:
    """What a run does to a model, with all of it in memory."""
    config = model.config
    adapter = find_adapter("auto", config.model_type)
    declared = residual_of(adapter, config, subsets_of(config))
    options = {"random": random, "keeps_mean": declared.keeps_mean}
    rotation = make_rotation(config.hidden_size, seed, **options)
    heads = heads_of(config)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edges = [name for name in weights if not name.startswith(f"{adapter.blocks}.")]
    behind = {name for name in edges if any(name.startswith(f"{part}.") for part in adapter.head)}
    front = rotate_embedding({name: weights[name] for name in edges if name not in behind}, declared, rotation)
    head = rotate_head({name: weights[name] for name in behind}, declared, rotation)
    for name, tensor in {**front, **head}.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    for index, block in enumerate(model.get_submodule(adapter.blocks)):
        values = make_rotation(heads.dim, seed + 1 + index, random=random)
        rotate_block(block, adapter.subsets(config, block), heads, rotation, values, online)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_a_rotated_model_computes_what_it_did(name, random):
    model = model_of(EVERY[name])
    before = logits(model)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotate(model, random=random)
    assert change(before, logits(model)) < 1e-10
    after = model.state_dict()
    untouched = [name for name in kept if torch.equal(kept[name], after[name])]
    # Queries and keys keep their outputs, so theirs are the only biases and norms of RMSNorm models that stay.
    expected = ("q_proj.bias", "k_proj.bias", "gate_proj.bias", "up_proj.bias", "q_norm.weight", "k_norm.weight")
    assert all(name.endswith(expected) for name in untouched), untouched


@torch.no_grad()
@pytest.mark.parametrize("space", ["residual", "heads", "ffn"])
@pytest.mark.parametrize("name", EVERY)
def test_a_rotated_model_can_still_be_scaled_channel_by_channel(name, space):
    """A norm's weight acts behind the normalization, on the rotated channels that its readers read, and no longer on
    the residual itself; the value heads' rotation is one of rows that a scale may follow."""
    model = model_of(EVERY[name])
    config, heads = model.config, heads_of(model.config)
    adapter = find_adapter("auto", config.model_type)
    before = logits(model)
    rotate(model)
    for block in model.get_submodule(adapter.blocks):
        for seed, subset in enumerate(subset for subset in adapter.subsets(config, block) if subset.reads == space):
            prev, linears = block.get_submodule(subset.prev), [block.get_submodule(n) for n in subset.linears]
            columns = linears[0].in_features
            rule = scale_rule(subset, prev, columns, heads, allow_gqa=True)
            scale = torch.rand(columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
            kept = linears[0].weight.clone()
            fold_scale(prev, linears, rule.tie(scale), rule, torch.float64)
            assert change(kept, linears[0].weight) > 0.1
    assert change(before, logits(model)) < 1e-10


@pytest.mark.parametrize("name", EVERY)
def test_the_last_feed_forward_linear_undoes_what_rotates_its_input(name):
    """The rotation that runs with the model is that of a dense matrix, multiplied by a hook of the test's own."""
    model, size = model_of(EVERY[name]), 40
    before = logits(model)
    rotate(model, online=OnlineRotation(hadamard(size)))
    assert change(before, logits(model)) > 1e-2
    dense = hadamard(size).matrix().double() / size**0.5
    for path, module in model.named_modules():
        if path.endswith(("down_proj", "fc2")):
            module.register_forward_pre_hook(lambda _, args: (args[0] @ dense,))
    assert change(before, logits(model)) < 1e-10


@pytest.mark.parametrize("name", EVERY)
def test_norms_are_left_bare(name):
    model = model_of(EVERY[name])
    rotate(model)
    for path, module in model.named_modules():
        if "norm" in path.lower() and "q_norm" not in path and "k_norm" not in path:
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            bias = getattr(module, "bias", None)
            if bias is not None:
                assert bias.unique().tolist() in ([0.0], [1.0])


def test_a_rotation_that_moves_the_mean_would_change_a_model_with_layer_norms(monkeypatch):
    model = model_of(CONFIGS["opt"])
    before = logits(model)
    opt = find_adapter("auto", "opt")
    moving = replace(opt, residual=lambda config: replace(opt.residual(config), keeps_mean=False))
    monkeypatch.setattr("test_rotate.find_adapter", lambda *_: moving)
    rotate(model)
    assert change(before, logits(model)) > 1e-2


def test_a_hidden_state_is_rotated_as_a_whole():
    """The state between two blocks is that of the original times Q: the rotation is there, not undone somewhere."""
    model = model_of(CONFIGS["qwen2"])

    @torch.no_grad()
    def hidden() -> Tensor:
        tokens = torch.randint(50, (1, 5), generator=torch.Generator().manual_seed(1))
        states = []
        hook = model.model.layers[0].register_forward_hook(
            lambda _, args, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
        model(tokens)
        hook.remove()
        return states[0]

    before = hidden()
    rotate(model, seed=3)
    assert change(make_rotation(32, 3)(before), hidden()) < 1e-10


def test_value_heads_are_rotated_each_by_itself():
    """Against dense matrices, written down from the definition."""
    model = model_of(CONFIGS["llama-gqa"])
    attention = model.model.layers[0].self_attn
    v, o = attention.v_proj.weight.clone(), attention.o_proj.weight.clone()
    scale = model.model.layers[0].input_layernorm.weight.clone()
    rotate(model, seed=5)
    eye = torch.eye(32, dtype=torch.float64)
    q = make_rotation(32, 5)(eye)
    r = make_rotation(8, 6)(eye[:8, :8])
    torch.testing.assert_close(attention.v_proj.weight, torch.block_diag(r, r).T @ v * scale @ q)
    torch.testing.assert_close(attention.o_proj.weight, q.T @ o @ torch.block_diag(r, r, r, r))


def test_weights_are_rounded_once():
    """In float32 the result is the rounded float64 one."""
    exact, single = model_of(CONFIGS["opt"]), model_of(CONFIGS["opt"]).float()
    exact.load_state_dict({name: tensor.double() for name, tensor in single.state_dict().items()})
    rotate(exact)
    rotate(single)
    for name, tensor in single.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, exact.state_dict()[name].float()), name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"do_layer_norm_before": False}, "norms stand behind each addition"),
        ({"word_embed_proj_dim": 16}, "projections stand between"),
        ({"_remove_final_layer_norm": True}, "no norm behind the last block"),
    ],
)
def test_what_the_architecture_forbids_is_refused_with_the_reason(changes, reason):
    config = variant("opt", **changes)
    with pytest.raises(ModelError, match=reason):
        residual_of(find_adapter("auto", "opt"), config, subsets_of(config))


def test_an_adapter_that_declares_too_little_is_refused():
    llama, config = find_adapter("auto", "llama"), CONFIGS["llama"]

    def without(**changes: object):
        return tuple(replace(subset, **changes) for subset in subsets_of(config))

    for adapter, subsets in ((replace(llama, residual=None), subsets_of(config)), (llama, without(writes=None))):
        with pytest.raises(ModelError, match="doesn't declare who writes and reads the residual"):
            residual_of(adapter, config, subsets)
    with pytest.raises(ModelError, match=r"self_attn\.q_proj reads the residual, but no norm"):
        residual_of(llama, config, without(prev=None))


TEXT = [adapter for adapter in ADAPTERS if adapter.images is None]  # the others have tests of their own


@pytest.mark.parametrize("adapter", TEXT, ids=lambda adapter: adapter.name)
def test_every_adapter_declares_its_residual(adapter):
    config: PretrainedConfig = next(c for c in CONFIGS.values() if c.model_type in adapter.model_types)
    assert residual_of(adapter, config, subsets_of(config)).readers == ("lm_head",)
