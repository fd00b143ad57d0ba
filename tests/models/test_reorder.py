"""A reordered block computes what it did, in exact arithmetic; what can't be reordered is refused."""

from __future__ import annotations

import pytest
import torch
from exact import CONFIGS, ROTARY, change, logits, model_of, subsets_of
from torch import Tensor
from transformers import PretrainedConfig, Starcoder2Config

from llmc.errors import ModelError
from llmc.models import (
    Heads,
    Orders,
    check_reorderable,
    find_adapter,
    heads_of,
    over_query_heads,
    plan_moves,
    reorder_block,
)

EVERY: dict[str, PretrainedConfig] = {
    name: config for name, config in CONFIGS.items() if name not in ("opt-post-norm", "gpt2")
} | {
    "starcoder2": Starcoder2Config(**ROTARY, num_key_value_heads=2),  # GELU absorbs no scale, but passes an order on
    "llama-tied": type(CONFIGS["llama-gqa"])(**{**CONFIGS["llama-gqa"].to_dict(), "tie_word_embeddings": True}),
}


def shuffled(heads: int, dim: int, seed: int) -> Tensor:
    """An order of ``heads * dim`` channels within each head."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(dim, generator=generator) + head * dim for head in range(heads)])


def random_orders(config: PretrainedConfig) -> Orders:
    heads = heads_of(config)
    subsets = subsets_of(config)
    width = {
        "residual": config.hidden_size,
        "ffn": getattr(config, "ffn_dim", 0) or getattr(config, "intermediate_size", 0),
    }
    inputs = {
        subset.key: shuffled(heads.kv, heads.dim, seed)
        if subset.reads == "heads"
        else shuffled(1, width[subset.reads], seed)
        for seed, subset in enumerate(subsets)
    }
    orderable = any(subset.orderable for subset in subsets)
    return Orders(inputs, shuffled(heads.kv, heads.dim, 9) if orderable else None)


@pytest.mark.parametrize("name", EVERY)
def test_a_reordered_model_computes_what_it_did(name):
    config = EVERY[name]
    model, adapter = model_of(config), find_adapter("auto", config.model_type)
    before = logits(model)
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for block in model.get_submodule(adapter.blocks):
        reorder_block(block, plan_moves(subsets_of(config), heads_of(config), random_orders(config)))
    assert change(before, logits(model)) < 1e-10
    after = model.state_dict()
    moved = {key.rpartition(".")[0].rpartition(".")[2] for key in kept if not torch.equal(kept[key], after[key])}
    linears = {name.rpartition(".")[2] for subset in subsets_of(config) for name in subset.linears}
    assert moved == linears  # all of them, and nothing else: neither norms nor embeddings


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("left_out", ["rows", "columns", "norms"])
def test_each_part_of_a_reordering_is_needed(name, left_out):
    config = EVERY[name]
    model, adapter = model_of(config), find_adapter("auto", config.model_type)
    before = logits(model)
    moves = plan_moves(subsets_of(config), heads_of(config), random_orders(config))
    getattr(moves, left_out).clear()
    for block in model.get_submodule(adapter.blocks):
        reorder_block(block, moves)
    assert change(before, logits(model)) > 1e-3


def test_query_heads_follow_their_value_head():
    order = torch.tensor([1, 2, 0, 3, 5, 4])
    assert over_query_heads(order, Heads(4, 2, 3)).tolist() == [1, 2, 0, 4, 5, 3, 6, 8, 7, 9, 11, 10]


def test_pairs_of_a_rotary_embedding_may_change_places_if_its_frequencies_do():
    """Scores of queries and keys whose pairs are reordered, both halves alike, by an embedding with its frequencies in
    the same order: what a kernel does where a checkpoint can't."""
    dim, tokens = 16, 7
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(tokens, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))

    def turned(states: Tensor, speeds: Tensor) -> Tensor:
        angles = torch.arange(tokens, dtype=torch.float64)[:, None] * speeds
        first, second = states.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def scores(order: Tensor, speeds: Tensor) -> Tensor:
        return turned(query[:, order], speeds) @ turned(key[:, order], speeds).T

    half = torch.randperm(dim // 2, generator=generator)
    whole = torch.cat([half, half + dim // 2])
    expected = scores(torch.arange(dim), frequencies)
    assert change(expected, scores(whole, frequencies[half])) < 1e-12
    assert change(expected, scores(whole, frequencies)) > 1e-2
    assert change(expected, scores(torch.randperm(dim, generator=generator), frequencies)) > 1e-2


def test_keys_behind_a_rotary_embedding_are_refused():
    config = CONFIGS["llama-gqa"]
    subsets, orders = subsets_of(config), random_orders(config)
    with pytest.raises(ValueError, match="rotary"):
        plan_moves(subsets, heads_of(config), Orders(orders.inputs, torch.arange(16)))


def test_norms_behind_the_branches_are_refused():
    with pytest.raises(ModelError, match="norms stand behind each branch"):
        check_reorderable(subsets_of(CONFIGS["opt-post-norm"]))


def test_queries_keys_and_values_of_one_linear_are_refused():
    with pytest.raises(ModelError, match="makes several tensors"):
        check_reorderable(subsets_of(CONFIGS["gpt2"]))
