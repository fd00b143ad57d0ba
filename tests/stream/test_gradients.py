"""Gradients that come back block by block are those of the whole model."""

from __future__ import annotations

import pytest
import torch
from gradients_oracle import assert_alike, streamed, whole
from torch import nn

from llmc.stream.gradients import Outputs


def test_of_every_family(tiny, tokens, tmp_path):
    batches = [tokens(1, 20, seed=1), tokens(2, 12, seed=2)]
    assert_alike(streamed(tiny, batches, tmp_path), whole(tiny, batches))


def test_a_text_longer_than_what_the_head_makes_at_once(checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("llmc.stream.gradients._HEAD_TOKENS", 5)
    batches = [tokens(1, 13, seed=3)]
    assert_alike(streamed(checkpoint("llama-tied"), batches, tmp_path), whole(checkpoint("llama-tied"), batches))


@pytest.mark.parametrize("elsewhere", [0, 1200])
def test_the_importance_predicts_how_far_a_small_error_moves_the_distribution(elsewhere):
    """Of a softmax behind one Linear, with independent errors of equal size in all outputs: the expected divergence.
    Tokens that went elsewhere, as most do that an expert isn't chosen for, aren't moved, and count."""
    torch.manual_seed(0)
    tokens, width, inner, draws = 400, 6, 5, 300
    inputs, weight = torch.randn(tokens, inner).double(), torch.randn(width, inner).double()
    outputs = inputs @ weight.T
    odds = outputs.softmax(-1)
    seen = Outputs(width, tokens, float(outputs.square().sum()), 0.0)
    for _ in range(draws):  # the gradient of -log p(drawn) is p - onehot(drawn)
        drawn = nn.functional.one_hot(torch.multinomial(odds, 1)[:, 0], width)
        seen.gradients += float((odds - drawn).square().sum()) / draws
    small = 1e-3
    divergences = []
    for _ in range(draws):
        error = small * outputs.square().mean().sqrt() * torch.randn_like(outputs)
        moved = (outputs + error).log_softmax(-1)
        divergences.append(float((odds * (odds.log() - moved)).sum()) / (tokens + elsewhere))
    expected = sum(divergences) / draws
    assert seen.importance(tokens + elsewhere) * small**2 == pytest.approx(expected, rel=0.02)


def test_a_linear_that_no_token_reached_has_no_importance():
    assert Outputs(4).importance(10) == 0.0
