"""Experts in a budget: gradients of their own tokens, one scheme for all of a block."""

from __future__ import annotations

import json

import pytest
from cases import make_case
from gradients_oracle import assert_alike, streamed, whole

W4 = {"bit": 4, "symmetric": True, "granularity": "per_group", "group_size": 32}


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "deepseek-v3"])
def test_gradients_of_experts_are_those_of_the_whole_model(checkpoint, tokens, tmp_path, family):
    tiny, batches = checkpoint(family), [tokens(1, 20, seed=1), tokens(2, 12, seed=2)]
    assert_alike(streamed(tiny, batches, tmp_path), whole(tiny, batches))


def test_all_experts_of_a_block_get_one_scheme_that_vllm_loads(source_of, texts, tmp_path):
    budget = {"budget": 6.0, "candidates": [{"bit": 4}, {"bit": 8}]}
    run = make_case(source_of("qwen2-moe"), texts, tmp_path / "out", "GPTQ", quant={"weight": W4, "mix_bits": budget})
    metrics = run.compress().metrics
    found = json.loads((run.save_path / "sensitivity.json").read_text())
    together = {(one["block"], one["together"]) for one in found["layers"] if ".experts." in one["kind"]}
    blocks = {one["block"] for one in found["layers"] if ".experts." in one["kind"]}
    assert blocks and {block for block, _ in together} == blocks and len(together) == len(blocks)
    assert 5.5 < metrics["bits_per_weight"] <= 6.0
