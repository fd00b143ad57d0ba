"""Masks against sorting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc.quant import Sparsity, lowest, prune_mask
from llmc.quant import sparsity as module


def sorted_by_hand(scores: list[float], count: int) -> list[bool]:
    first = sorted(range(len(scores)), key=lambda index: (scores[index], index))[:count]
    return [index in first for index in range(len(scores))]


@pytest.mark.parametrize("length", [1, 4, 8, 9, 20])  # up to 8 are compared pair by pair, more are selected
@given(data=st.data())
def test_the_lowest_of_each_row_and_of_equal_ones_the_first(length, data):
    row = st.lists(st.integers(0, 4), min_size=length, max_size=length)
    rows, count = data.draw(st.lists(row, min_size=1, max_size=5)), data.draw(st.integers(0, length))
    found = lowest(torch.tensor(rows, dtype=torch.float32), count)
    assert found.tolist() == [sorted_by_hand(row, count) for row in rows]


def test_portions_do_not_show(monkeypatch):
    score = torch.rand(33, 8, generator=torch.Generator().manual_seed(0))
    whole = lowest(score, 3)
    monkeypatch.setattr(module, "_PORTION", 20)
    assert torch.equal(lowest(score, 3), whole)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.29, 0.5, 0.7, 0.99])
def test_each_row_or_the_whole_loses_its_share(ratio):
    score = torch.rand(12, 100, generator=torch.Generator().manual_seed(1))
    count = round(100 * ratio)
    by_row = prune_mask(score, Sparsity(ratio), compare="row")
    assert by_row.sum(1).tolist() == [count] * 12
    flat = score.flatten().numpy()
    over_all = prune_mask(score, Sparsity(ratio), compare="all").flatten().numpy()
    assert over_all.sum() == 12 * count
    assert set(np.flatnonzero(over_all)) == set(np.argsort(flat)[: 12 * count])


@pytest.mark.parametrize("compare", ["row", "all"])
@pytest.mark.parametrize(("zeros", "of"), [(2, 4), (1, 4), (3, 4), (4, 8), (5, 6)])
def test_a_pattern_counts_zeros_in_each_run(compare, zeros, of):
    score = torch.rand(7, 48, generator=torch.Generator().manual_seed(2))
    mask = prune_mask(score, Sparsity(zeros / of, (zeros, of)), compare=compare)
    for row, found in zip(score.tolist(), mask.tolist(), strict=True):
        for start in range(0, 48, of):
            assert found[start : start + of] == sorted_by_hand(row[start : start + of], zeros)


def test_a_pattern_that_does_not_divide_the_channels_is_refused():
    with pytest.raises(ValueError, match="runs of 4 don't divide 10"):
        prune_mask(torch.rand(2, 10), Sparsity(0.5, (2, 4)), compare="row")


@pytest.mark.parametrize("wrong", [(1.0, None), (-0.1, None), (0.5, (1, 4)), (0.0, (0, 4)), (0.5, (4, 4))])
def test_what_is_no_sparsity_is_refused(wrong):
    with pytest.raises(ValueError, match="sparsity"):
        Sparsity(*wrong)


def test_names():
    assert Sparsity(0.5).describe() == "50% zeros"
    assert Sparsity(0.333).describe() == "33.3% zeros"
    assert Sparsity(0.25, (1, 4)).describe() == "1:4 zeros"
