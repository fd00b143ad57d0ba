"""Streamed greedy continuations against the whole model's own generate."""

from __future__ import annotations

import pytest
from own_tasks import whole_logits

from llmc.eval.greedy import greedy_streamed, greedy_whole

LIMIT, COUNT = 64, 12


@pytest.fixture
def prompts(tokens):
    return [tuple(tokens(1, length, seed)[0].tolist()) for seed, length in enumerate((3, 31, 17, 1, 40))]


@pytest.mark.parametrize("alone", [False, True])
def test_a_streamed_model_says_what_the_whole_one_says(model, prompts, alone):
    passes = []

    def logits(batches, visit):
        passes.append(sum(map(len, batches)))
        whole_logits(model, chunk=9)(batches, visit)

    plain = greedy_whole(prompts, model, COUNT, ())
    assert {len(new) for new in plain} == {COUNT}
    ends = {plain[0][4], plain[2][7]}  # two texts end early
    wanted = greedy_whole(prompts, model, COUNT, ends)
    assert len({len(new) for new in wanted}) > 1
    assert greedy_streamed(prompts, logits, COUNT, ends, LIMIT, batch_size=2, alone=alone) == wanted
    assert passes[0] == len(prompts) and passes[-1] < len(prompts)


def test_a_model_that_samples_by_itself_is_greedy_all_the_same(model, prompts):
    plain = greedy_whole(prompts[:2], model, COUNT, ())
    try:
        model.generation_config.do_sample, model.generation_config.temperature = True, 30.0
        model.generation_config.repetition_penalty = 5.0
        assert greedy_whole(prompts[:2], model, COUNT, ()) == plain
    finally:
        model.generation_config = type(model.generation_config)()
