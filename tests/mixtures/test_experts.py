"""Experts as Linears are Transformers' experts: the same weights, and the same outputs bit for bit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import CONFIGS, expert_weights, fused_experts, linear_state
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmc.models.experts import LinearExperts
from llmc.models.mixture import in_solving_order, split

EXPERTS, CHOSEN = 4, 2


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def pair(family: str, dtype: torch.dtype) -> tuple[torch.nn.Module, LinearExperts]:
    """A module of Transformers' own and ours with its weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=dtype, experts_implementation="eager").eval()
    fused = next(reversed(fused_experts(model).values()))
    for parameter in fused.parameters():
        parameter.normal_(std=0.2)
    ours = LinearExperts(fused)
    ours.load_state_dict(expert_weights(fused))
    return fused, ours


def routing(tokens: int, allowed: list[int], seed: int = 0) -> Tensor:
    """Two of the allowed experts for each token, ``[tokens, 2]``."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(len(allowed), generator=generator)[:CHOSEN] for _ in range(tokens)]
    return torch.tensor(allowed)[torch.stack(rows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "allowed"),
    [(23, [0, 1, 2, 3]), (23, [1, 3]), (1, [0, 1, 2, 3]), (2, [0, 2, 3])],
    ids=["all", "two without tokens", "one token", "two tokens"],
)
def test_the_output_is_transformers_own_bit_for_bit(family, dtype, tokens, allowed):
    fused, ours = pair(family, dtype)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, 64, generator=generator).to(dtype)
    weights = torch.rand(tokens, CHOSEN, generator=generator).to(dtype)
    chosen = routing(tokens, allowed)
    expected = fused(hidden, chosen, weights)
    assert expected.dtype == dtype and expected.abs().max() > 0
    assert torch.equal(ours(hidden, chosen, weights), expected)
    ours.all_tokens = True  # what the ports show changes nothing
    assert torch.equal(ours(hidden, chosen, weights), expected)


def test_each_expert_is_shown_its_own_tokens(family):
    """First those whose first choice it is, each time in the order of the batch; none where nobody chose it."""
    _, ours = pair(family, torch.float32)
    seen = {}
    for port in ("entrance", "between"):
        getattr(ours, port).register_forward_pre_hook(lambda _, args, port=port: seen.update({port: args[0]}))
    hidden, chosen = torch.randn(9, 64, generator=torch.Generator().manual_seed(2)), routing(9, [0, 1, 3])
    ours(hidden, chosen, torch.ones(9, CHOSEN))
    for index in range(EXPERTS):
        own = hidden[torch.cat([torch.where(choice == index)[0] for choice in chosen.T])]
        assert seen["entrance"].tokens(index) == seen["between"].tokens(index) == len(own)
        assert torch.equal(seen["entrance"].of(index), own)
        torch.testing.assert_close(seen["between"].of(index), ours.inner(index, own))
    assert seen["entrance"].tokens(2) == 0 and not seen["entrance"].common


def test_all_experts_are_shown_all_tokens_if_asked(family):
    _, ours = pair(family, torch.float32)
    ours.all_tokens = True
    seen = {}
    for port in ("entrance", "between"):
        getattr(ours, port).register_forward_pre_hook(lambda _, args, port=port: seen.update({port: args[0]}))
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(2))
    ours(hidden, routing(9, [0, 1, 3]), torch.ones(9, CHOSEN))
    assert seen["entrance"].common and not seen["between"].common
    for index in range(EXPERTS):
        assert seen["entrance"].tokens(index) == seen["between"].tokens(index) == 9
        assert torch.equal(seen["entrance"].of(index), hidden)
        expert = ours.expert(index)
        inner = torch.nn.functional.silu(expert.gate_proj(hidden)) * expert.up_proj(hidden)
        torch.testing.assert_close(seen["between"].of(index), inner)


def test_loading_unit_by_unit_equals_from_pretrained(tiny):
    """Routers, their buffers and shared experts too."""
    expected = linear_state(tiny.model())
    loaded = tiny.loaded().model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor), name
    biases = [name for name in loaded if name.endswith("e_score_correction_bias")]
    assert bool(biases) == (tiny.name == "deepseek-v3")
    assert all(loaded[name].abs().max() > 0 for name in biases)


def test_every_tensor_belongs_to_one_unit_and_is_read_once(tiny):
    skeleton = tiny.skeleton()
    assert Counter(name for unit in skeleton.units.values() for name in unit) == Counter(list(tiny.entries))
    source = tiny.source(skeleton)
    for unit in skeleton.units:
        source.take(unit)
    source.close()
    assert source.bytes_read == sum(entry.nbytes for entry in tiny.entries.values())


def test_every_linear_of_a_block_but_gates_is_in_one_subset(tiny):
    """And who is folded with it is there."""
    skeleton = tiny.skeleton()
    mixtures = 0
    for block, subsets in zip(skeleton.blocks, tiny.block_subsets, strict=True):
        linears = {name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
        named = Counter(name for subset in subsets for name in subset.linears)
        assert linears - named.keys() <= {"mlp.shared_expert_gate"} and set(named.values()) == {1}
        for subset in subsets:
            for name in (*subset.also, *((subset.prev,) if subset.prev and "*" not in subset.prev else ())):
                assert block.get_submodule(name).weight is not None
        mixtures += any(subset.experts for subset in subsets)
    assert mixtures == (2 if tiny.name in ("mixtral", "qwen3-moe", "qwen3-next") else 1)


def test_what_feeds_an_expert_is_solved_before_its_last_linear(tiny):
    for subsets in tiny.block_subsets:
        order = [name for subset in in_solving_order(subsets) for part in split(subset) for name in part.linears]
        assert sorted(order) == sorted(name for subset in subsets for name in subset.linears)
        for name in order:
            if name.endswith("down_proj"):
                up = name.replace("down_proj", "up_proj")
                assert order.index(up) < order.index(name)
