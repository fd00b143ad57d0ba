"""Sums over tokens, against float64."""

from __future__ import annotations

import pytest
import torch

from llmc.algorithms import new_statistics
from llmc.algorithms.stats import AbsMean, Gram, relative_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_is_the_symmetric_product_of_all_tokens(columns, dtype):
    batches = [torch.randn(2, 20, columns, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    gram = Gram(columns, CPU)
    for batch in batches:
        gram.update(batch)
    inputs = torch.cat(batches).reshape(-1, columns).double()
    exact = inputs.T @ inputs
    assert (gram.matrix - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert torch.equal(gram.matrix, gram.matrix.T)
    assert gram.tokens == 120


def test_gram_goes_on_after_it_was_read():
    first, second = torch.randn(2, 30, 300, generator=torch.Generator().manual_seed(0))
    read_between, read_once = Gram(300, CPU), Gram(300, CPU)
    read_between.update(first)
    _ = read_between.matrix
    for gram in (read_between, read_once):
        gram.update(second)
    read_once.update(first)
    torch.testing.assert_close(read_between.matrix, read_once.matrix)
    assert torch.equal(read_between.matrix, read_between.matrix.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_abs_mean_weighs_tokens_not_batches(dtype):
    batches = [torch.randn(n, 7, 24, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 5)]
    statistic = AbsMean(24, CPU)
    for batch in batches:
        statistic.update(batch)
    expected = torch.cat(batches).reshape(-1, 24).double().abs().mean(0)
    torch.testing.assert_close(statistic.mean.double(), expected, rtol=1e-6, atol=0)


def test_without_tokens_the_mean_is_zero():
    assert torch.equal(AbsMean(3, CPU).mean, torch.zeros(3))


def test_only_what_was_asked_for_is_accumulated():
    statistics = new_statistics({"gram"}, 4, CPU)
    statistics.update(torch.ones(2, 4))
    assert statistics.abs_mean is None
    assert statistics.gram.tokens == 2


def test_relative_error_is_that_of_the_outputs(tokens):
    inputs = tokens(50, 16).double()
    before, after = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    outputs, changed = inputs @ before.double().T, inputs @ after.double().T
    expected = ((changed - outputs).square().sum() / outputs.square().sum()).item()
    assert relative_error(before, after, (inputs.T @ inputs).float()) == pytest.approx(expected, rel=1e-5)
    without_inputs = ((after - before).square().sum() / before.square().sum()).item()
    assert relative_error(before, after, None) == pytest.approx(without_inputs, rel=1e-5)
