"""Folding a scale leaves every architecture's block as it was, in exact arithmetic and with rounded norms."""

from __future__ import annotations

import pytest
import torch
from exact import CONFIGS, change, fold, model_of, output_of, subsets_of
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llmc.models import Heads, ScaleRule, Subset, find_adapter, fold_scale, fold_shift, heads_of, scale_rule, smoothed


def block_of(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(find_adapter("auto", model.config.model_type).blocks)[0]


def foldable(config: PretrainedConfig) -> list[Subset]:
    return [subset for subset in subsets_of(config) if subset.prev is not None]


CASES = [
    pytest.param(name, subset, id=f"{name}-{subset.inspect}-{subset.reads}")
    for name, config in CONFIGS.items()
    for subset in foldable(config)
]


@pytest.mark.parametrize(("name", "subset"), CASES)
@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16, torch.float16])
def test_folding_a_scale_preserves_the_block(name, subset, stored):
    model = model_of(CONFIGS[name])
    before = output_of(model)
    kept = [parameter.clone() for parameter in block_of(model).parameters()]
    fold(model, subset, stored)
    assert change(before, output_of(model)) < 1e-10
    changed = sum(not torch.equal(a, b) for a, b in zip(kept, block_of(model).parameters(), strict=True))
    assert changed >= len(subset.linears) + 1


@pytest.mark.parametrize("name", CONFIGS)
def test_all_folds_of_a_block_go_together(name):
    model = model_of(CONFIGS[name])
    before = output_of(model)
    for seed, subset in enumerate(foldable(model.config)):
        fold(model, subset, torch.bfloat16, seed)
    assert change(before, output_of(model)) < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_folded_norm_is_stored_without_a_rounding(name, stored):
    model = model_of(CONFIGS[name])
    norms = [subset for subset in foldable(model.config) if "norm" in subset.prev or "ln_" in subset.prev]
    for subset in norms:
        fold(model, subset, stored)
        weight = block_of(model).get_submodule(subset.prev).weight
        assert torch.equal(weight, weight.to(stored).double())
    assert len(norms) == (0 if name == "opt-post-norm" else 2)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_float32_weights_are_folded_to_float32_precision(stored):
    model = model_of(CONFIGS["llama-gqa"]).float()
    exact = output_of(model.double())
    model.float()
    for subset in foldable(model.config):
        fold(model, subset, stored)
    assert change(exact, output_of(model.double())) < 1e-6


def norm_and_linear(weight: list[float]) -> tuple[nn.RMSNorm, nn.Linear]:
    norm, linear = nn.RMSNorm(len(weight), eps=1e-6), nn.Linear(len(weight), 3, bias=False)
    norm.weight.data = torch.tensor(weight)
    return norm, linear


@pytest.mark.parametrize(
    ("stored", "scale"),
    [
        (torch.float16, 1e8),  # 1/scale is 0 in float16
        (torch.float16, 1e-6),  # and 1/scale infinite
        (torch.bfloat16, 4.0),
    ],
)
def test_channels_that_could_not_be_stored_keep_their_scale(stored, scale):
    """The second channel's norm is 0: nothing divides it. The third is folded as asked."""
    norm, linear = norm_and_linear([1.0, 0.0, 2.0])
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    before, kept = linear(norm(inputs)), linear.weight.clone()
    fold_scale(norm, [linear], torch.tensor([scale, scale, 2.0]), ScaleRule(), stored)
    torch.testing.assert_close(linear(norm(inputs)), before)
    assert norm.weight.tolist() == [1.0 if stored == torch.float16 else 0.25, 0.0, 1.0]
    assert torch.equal(linear.weight[:, 1], kept[:, 1])


def test_what_has_no_weight_absorbs_nothing():
    bare = nn.RMSNorm(3, elementwise_affine=False)
    with pytest.raises(TypeError, match="RMSNorm has no weight"):
        fold_scale(bare, [nn.Linear(3, 3)], torch.ones(3), ScaleRule(), torch.float32)


def test_post_norms_feed_no_linear():
    prevs = {subset.linears[0]: subset.prev for subset in subsets_of(CONFIGS["opt-post-norm"])}
    assert prevs == {"self_attn.q_proj": None, "self_attn.out_proj": "self_attn.v_proj", "fc1": None, "fc2": "fc1"}


@pytest.mark.parametrize(
    ("reads", "prev_rows", "allow_gqa", "expected"),
    [
        ("residual", 32, False, ScaleRule()),
        ("heads", 32, False, ScaleRule()),
        ("heads", 8, True, ScaleRule(repeat=4, head_dim=4)),
        ("heads", 8, False, None),
        ("ffn", 8, True, None),  # as many channels by chance: no heads
        ("heads", 16, True, None),
    ],
)
def test_a_scale_is_absorbed_where_channels_correspond(reads, prev_rows, allow_gqa, expected):
    subset, heads = Subset(("o",), "v", "o", reads=reads), Heads(query=8, kv=2, dim=4)
    assert scale_rule(subset, nn.Linear(16, prev_rows), 32, heads, allow_gqa=allow_gqa) == expected


def test_query_heads_of_a_value_head_are_tied_by_their_geometric_mean():
    rule = ScaleRule(repeat=2, head_dim=1)
    tied = rule.tie(torch.tensor([1.0, 4.0, 9.0, 16.0]))  # two value heads with two query heads each
    torch.testing.assert_close(tied, torch.tensor([2.0, 2.0, 12.0, 12.0]))
    torch.testing.assert_close(rule.to_prev(tied), torch.tensor([2.0, 12.0]))


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16])
def test_a_shift_leaves_the_block_as_it_was(stored):
    """Only OPT has the biases. What a norm's bias loses in rounding is what its readers don't add."""
    model = model_of(CONFIGS["opt"])
    subsets = [subset for subset in foldable(model.config) if subset.prev and subset.prev.endswith("norm")]
    assert len(subsets) == 2
    if stored == torch.bfloat16:
        with torch.no_grad():
            for subset in subsets:
                bias = block_of(model).get_submodule(subset.prev).bias
                bias.copy_(bias.to(stored))
    expected = output_of(model)
    for seed, subset in enumerate(subsets):
        block = block_of(model)
        prev, linears = block.get_submodule(subset.prev), [block.get_submodule(name) for name in subset.linears]
        before = prev.bias.clone()
        shift = torch.randn(len(before), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5
        fold_shift(prev, linears, shift, stored)
        assert not torch.equal(before, prev.bias) and torch.equal(prev.bias, prev.bias.to(stored).double())
    torch.testing.assert_close(output_of(model), expected, rtol=1e-10, atol=1e-10)


def test_a_shift_needs_biases():
    block = block_of(model_of(CONFIGS["llama"]))
    with pytest.raises(TypeError, match="biases"):
        fold_shift(block.input_layernorm, [block.self_attn.q_proj], torch.ones(32), torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_smoothed_weights_are_folded_ones_and_gradients_reach_the_scale(name):
    """All folds of a block together, shifts included where there are biases."""
    model, folded = model_of(CONFIGS[name]), model_of(CONFIGS[name])
    before, block = output_of(model), block_of(model)
    weights = {key: parameter.data.clone() for key, parameter in block.named_parameters()}
    changed, leaves, shifts = dict(weights), [], 0
    generator = torch.Generator().manual_seed(0)
    for subset in foldable(model.config):
        prev, linears = block.get_submodule(subset.prev), [block.get_submodule(n) for n in subset.linears]
        columns = linears[0].weight.shape[1]
        rule = scale_rule(subset, prev, columns, heads_of(model.config), allow_gqa=True)
        outputs = columns if subset.rows is not None else prev.weight.shape[0]
        divisor = torch.exp2(torch.rand(outputs, generator=generator, dtype=torch.float64) * 6 - 3)
        biased = all(getattr(module, "bias", None) is not None for module in (prev, *linears))
        shift = torch.randn(columns, generator=generator, dtype=torch.float64)
        shift = shift if biased and rule.repeat == 1 and subset.reads != "ffn" and subset.rows is None else None
        leaves.append(divisor.requires_grad_())
        changed |= smoothed(changed, subset.prev, subset.linears, divisor, rule, shift)
        other = block_of(folded)
        targets = other.get_submodule(subset.prev), [other.get_submodule(n) for n in subset.linears]
        if shift is not None:
            shifts += 1
            fold_shift(*targets, shift, torch.float64)
        fold_scale(*targets, rule.to_inputs(divisor.detach()), rule, torch.float64)
    for key, parameter in block_of(folded).named_parameters():
        torch.testing.assert_close(changed[key].detach(), parameter.data, rtol=1e-12, atol=1e-12)
    for key, parameter in block.named_parameters():
        assert torch.equal(parameter.data, weights[key]), "nothing is changed in place"
        parameter.data = changed[key].detach()
    assert change(before, output_of(model)) < 1e-10
    assert shifts == {"opt": 3, "opt-post-norm": 1, "gpt2": 2}.get(name, 0)
    gradients = torch.autograd.grad(sum(one.square().sum() for one in changed.values()), leaves)
    assert all(gradient.abs().min() > 0 for gradient in gradients)
