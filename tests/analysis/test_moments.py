"""Kurtosis, energy, outlier channels, errors and surfaces against SciPy, NumPy and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.stats import kurtosis

from llmc.analysis import (
    CELLS,
    InputProfile,
    Moments,
    OutputComparison,
    Spread,
    decibels,
    outlier_channels,
    plain,
    row_moments,
    surface,
)
from llmc.analysis import moments as moments_module


def heavy(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Heavy tails, a mean far from 0, and columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) ** 3 + 40
    return values * torch.logspace(-3, 3, columns)


def of_scipy(values: torch.Tensor, axis: int | None) -> np.ndarray:
    return kurtosis(values.double().numpy(), axis=axis, fisher=False)


@pytest.fixture
def few_at_once(monkeypatch):
    """So that a small matrix is gone through in many parts, the last one smaller."""
    monkeypatch.setattr(moments_module, "_AT_ONCE", 7 * 31)


@pytest.mark.usefixtures("few_at_once")
def test_kurtosis_of_rows_and_of_the_whole_are_scipys():
    weight = heavy(40, 31)
    rows = row_moments(weight)
    assert rows.kurtosis.numpy() == pytest.approx(of_scipy(weight, 1), rel=1e-9)
    assert float(rows.merged(0).kurtosis) == pytest.approx(float(of_scipy(weight, None)), rel=1e-9)
    assert float(rows.merged(0).energy) == pytest.approx(float((weight.double() ** 2).sum()), rel=1e-12)


@pytest.mark.usefixtures("few_at_once")
def test_a_profile_of_pieces_is_scipys_of_the_whole():
    tokens = heavy(61, 31)
    profile = InputProfile()
    for piece in (tokens[:1], tokens[1:1], tokens[1:40], tokens[40:]):
        profile.update(piece)
    found = profile.to_dict()
    by_channel, by_token = of_scipy(tokens, 0), of_scipy(tokens, 1)
    assert found["kurtosis"] == {
        "tensor": pytest.approx(float(of_scipy(tokens, None)), rel=1e-5),
        "channel": {"mean": pytest.approx(by_channel.mean(), rel=1e-5), "std": pytest.approx(by_channel.std(), 1e-5)},
        "token": {"mean": pytest.approx(by_token.mean(), rel=1e-5), "std": pytest.approx(by_token.std(), 1e-5)},
    }
    largest = tokens.abs().amax(0).double().numpy()
    ratios = largest / np.median(largest)
    energy = (tokens.double() ** 2).sum(0).numpy()
    order = np.argsort(-ratios)[:8]
    assert found["outliers"]["count"] == (ratios > 6).sum() > 3
    assert found["outliers"]["share"] == pytest.approx(energy[ratios > 6].sum() / energy.sum(), rel=1e-5)
    assert [one["channel"] for one in found["outliers"]["worst"]] == order.tolist()
    assert [one["ratio"] for one in found["outliers"]["worst"]] == pytest.approx(ratios[order], rel=1e-5)


def test_a_mean_far_away_costs_no_digits():
    values = torch.randn(1, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1e6
    parts = Moments.joined([Moments.of(part, 1) for part in values.split(512, dim=1)])
    assert float(parts.merged(0).kurtosis) == pytest.approx(float(of_scipy(values, None)), rel=1e-8)


def test_a_normal_distribution_has_three():
    values = torch.randn(8, 200_000, generator=torch.Generator().manual_seed(2))
    assert float(row_moments(values).merged(0).kurtosis) == pytest.approx(3, abs=0.02)


def test_constant_and_dead_channels_have_no_kurtosis_and_no_part_in_the_mean():
    tokens = heavy(16, 4)
    tokens[:, 1], tokens[:, 2] = 0, 0.1
    profile = InputProfile()
    profile.update(tokens)
    alive = of_scipy(tokens[:, [0, 3]], 0)
    assert profile.to_dict()["kurtosis"]["channel"]["mean"] == pytest.approx(alive.mean(), rel=1e-5)
    assert Spread.of(torch.full((3,), torch.nan)).to_dict() == {"mean": None, "std": None}


def test_no_token_no_profile():
    profile = InputProfile()
    profile.update(torch.empty(0, 8))
    assert profile.to_dict() is None


def test_an_outlier_is_more_than_six_medians_of_living_channels():
    largest = torch.tensor([1.0, 0.0, 1.0, 6.0, 6.001, 0.0, 0.5, 0.0, 1.0, 0.0])  # the median of all would be 0.75
    found = outlier_channels(largest, torch.ones(10))
    assert (found.count, found.share, found.worst[:2]) == (1, 1 / 10, ((4, pytest.approx(6.001)), (3, 6.0)))
    nothing = outlier_channels(torch.zeros(5), torch.zeros(5))
    assert nothing.to_dict() == {"count": 0, "share": None, "worst": []}


def test_error_cosine_and_decibels_are_numpys():
    generator = torch.Generator().manual_seed(3)
    inputs, weight = torch.randn(1100, 24, generator=generator), torch.randn(9, 24, generator=generator)
    rounded, changed = (tensor.mul(4).round().div(4) for tensor in (inputs, weight))
    compared = OutputComparison()
    compared.products(inputs[:700], weight, rounded[:700], changed)
    compared.products(inputs[700:], weight, rounded[700:], changed)
    y, y_q = ((x.double() @ w.double().T).numpy().ravel() for x, w in ((inputs, weight), (rounded, changed)))
    error = ((y_q - y) ** 2).sum() / (y**2).sum()
    assert compared.error == pytest.approx(error, rel=1e-5)
    assert compared.cosine == pytest.approx(1 - cosine(y, y_q), rel=1e-7)
    assert decibels(compared.error) == pytest.approx(-10 * np.log10(error), rel=1e-5)


def test_what_has_no_number():
    nothing = OutputComparison()
    assert math.isnan(nothing.error) and math.isnan(nothing.cosine) and math.isnan(decibels(math.nan))
    assert decibels(0.0) == math.inf and plain(math.inf) is None and plain(math.nan) is None
    assert plain(1234567.8) == 1234570.0


@pytest.mark.parametrize("shape", [(200, 300), (64, 128), (5, 1000), (130, 3)])
def test_a_surface_has_the_largest_magnitude_of_each_cell(shape):
    tokens = heavy(*shape) * torch.where(torch.arange(shape[1]) % 3 == 0, -1, 1)
    found = surface(tokens)
    rows, columns = (min(count, cells) for count, cells in zip(shape, CELLS, strict=True))
    assert (found.shape, found.dtype) == ((rows, columns), torch.float32)
    expected = torch.zeros(rows, columns)
    for i in range(rows):
        for j in range(columns):
            cell = tokens[i * shape[0] // rows : (i + 1) * shape[0] // rows]
            expected[i, j] = cell[:, j * shape[1] // columns : (j + 1) * shape[1] // columns].abs().max()
    assert torch.equal(found, expected) and found.max() == tokens.abs().max()
