"""Grids of clusters, brute force: one channel at a time, with the published formulas in plain numbers."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from llmc.quant import ClusterGrid, ClusterQuantizer, cluster_qparams

CHANNELS, SEQUENCES, TOKENS = 13, 4, 9
CPU = torch.device("cpu")


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([2, 0, 1, 0, 3, 2, 2, 1, 0, 3, 3, 3, 2])


@pytest.fixture
def tokens(labels) -> Tensor:
    """``[sequences, tokens, channels]``; each cluster at a place and of a size of its own, one of them at a point."""
    made = torch.randn(SEQUENCES, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    size, place = torch.tensor([1.0, 30.0, 0.1, 0.0])[labels], torch.tensor([0.0, -5.0, 3.0, 0.7])[labels]
    return made * size + place


def extremes(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens.amin(1), tokens.amax(1)


def one_by_one(tokens: Tensor, labels: Tensor, bits: int) -> Tensor:
    """Round the channels group by group where they stand, with scalars."""
    rounded = tokens.clone()
    for label in labels.unique():
        members = [channel for channel in range(CHANNELS) if labels[channel] == label]
        values = tokens[..., members]
        lo, hi = values.min(), values.max()
        scale = ((hi - lo) * 2.0**-bits).clamp(1e-4, 1e4)
        zero = torch.round((-(lo + hi) / (2 * scale)).clamp(-1e4, 1e4))
        for channel in members:
            codes = (torch.round(tokens[..., channel] / scale) + zero).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            rounded[..., channel] = (codes - zero) * scale
    return rounded


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_reordered_clusters_are_groups_of_channels_without_reordering_to_the_last_bit(tokens, labels, bits):
    grid = ClusterGrid.of(labels, bits, *extremes(tokens), None)
    expected, order = one_by_one(tokens, labels, bits), grid.order
    in_place = ClusterQuantizer(grid, CPU)(tokens)
    assert torch.equal(in_place, expected)
    assert torch.equal(ClusterQuantizer(grid, CPU, order)(tokens[..., order]), expected[..., order])
    assert (labels[order].diff() >= 0).all()  # each cluster is a run
    assert not torch.equal(expected, tokens)


def test_ranges_are_rounded_as_published():
    lo, hi = torch.tensor([-1.0, 0.0, 4.0, 0.9, -0.3]), torch.tensor([3.0, 8.0, 5.0, 0.9, -0.3])
    scale, zero = cluster_qparams(lo, hi, 4)
    expected = torch.tensor([0.25, 0.5, 0.0625, 1e-4, 1e-4])
    assert torch.equal(scale, expected)
    assert zero.tolist() == [-4, -8, -72, -9000, 3000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.98, 1.5, -6.0, 3000.0])
def test_a_range_of_one_value_keeps_it_however_far_from_0(value, bits, dtype):
    """The published scale, 1e-4, with a zero point of at most 10000, would make 1 of all values above it."""
    scale, zero = cluster_qparams(torch.tensor([value]), torch.tensor([value]), bits, dtype)
    last = 2 ** (bits - 1)
    code = (torch.round(value / scale) + zero).clamp(-last, last - 1)
    assert float((code - zero) * scale) == pytest.approx(value, rel=1e-4)
    assert zero.abs() <= 10000


def test_a_stored_scale_decides_the_zero_point():
    scale, zero = cluster_qparams(torch.tensor([0.1]), torch.tensor([0.77]), 4, torch.bfloat16)
    assert torch.equal(scale, scale.bfloat16().float())
    assert zero == torch.round(-torch.tensor(0.87) / (2 * scale))


def test_a_moving_range_forgets_one_percent_a_sequence():
    lo = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, -1.0, 1.0], [-2.0, -5.0, 2.0]])
    hi = -lo + 1
    grid = ClusterGrid.of(torch.tensor([1, 1, 0]), 4, lo, hi, 0.01)
    low_second = [-2.0, -3.0, -5.0]  # of channels 0 and 1 together, sequence by sequence
    expected = 0.99 * (0.99 * low_second[0] + 0.01 * low_second[1]) + 0.01 * low_second[2]
    assert grid.lo[1] == pytest.approx(expected, rel=1e-6)
    assert grid.hi[1] == pytest.approx(1 - expected, rel=1e-6)
    assert grid.lo[0] == pytest.approx(0.99 * (0.99 * 0 + 0.01 * 1) + 0.01 * 2, rel=1e-6)


def test_json_keeps_a_grid(tokens, labels):
    grid = ClusterGrid.of(labels, 4, *extremes(tokens), 0.01)
    assert ClusterGrid.from_plain(json.loads(json.dumps(asdict(grid)))) == grid
    assert ClusterGrid.from_plain(asdict(ClusterGrid((0, 1)))) == ClusterGrid((0, 1))


def test_without_bits_nothing_can_be_rounded():
    with pytest.raises(ValueError, match="without bits"):
        ClusterQuantizer(ClusterGrid((0, 0)), CPU)
