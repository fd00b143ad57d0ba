"""The search for the range with the least error, against a loop over plain numbers."""

from __future__ import annotations

import pytest
import torch

from llmc.quant import MinMax, Mse, PerChannel, PerGroup, QuantSpec, group_qparams, to_groups
from llmc.quant.affine import find_ranges


def heavy_tailed(rows: int, columns: int) -> torch.Tensor:
    noise = torch.distributions.StudentT(3.0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return noise.sample((rows, columns))


def naive_shrink(group: list[float], spec: QuantSpec, search: Mse) -> float:
    """The best of ``1 - i/grid`` of the group's *original* range."""
    lo, hi = min(0.0, *group), max(0.0, *group)
    half = 2 ** (spec.bits - 1)
    errors = {}
    for i in range(round(search.max_shrink * search.grid)):
        shrink = 1 - i / search.grid
        if spec.symmetric:
            scale, zero = shrink * max(-lo, hi) / (half - 1), 0
        else:
            scale = shrink * (hi - lo) / (2 * half - 1)
            zero = -half - round(shrink * lo / scale)
        rounded = [(min(max(round(w / scale) + zero, -half), half - 1) - zero) * scale for w in group]
        errors[shrink] = sum(abs(q - w) ** search.norm for q, w in zip(rounded, group, strict=True))
    return min(errors, key=errors.__getitem__)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("search", [Mse(), Mse(max_shrink=0.29, grid=100, norm=2.0)])
def test_the_range_is_the_best_fraction_of_the_original_one(symmetric, bits, search):
    weight = heavy_tailed(4, 64)
    spec = QuantSpec(bits, symmetric, PerGroup(32), ranges=search)
    groups = to_groups(weight, spec)
    expected = [[naive_shrink(group, spec, search) for group in row] for row in groups.tolist()]
    shrinks = torch.tensor(expected)[..., None]
    lo, hi = find_ranges(groups, spec)
    torch.testing.assert_close(lo, groups.amin(-1, keepdim=True) * shrinks)
    torch.testing.assert_close(hi, groups.amax(-1, keepdim=True) * shrinks)
    assert search != Mse() or len(shrinks.unique()) > 2  # the case tells candidates apart


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_searched_scale_is_never_larger_than_the_min_max_scale(symmetric):
    weight = heavy_tailed(8, 64)
    searched = group_qparams(weight, QuantSpec(3, symmetric, PerChannel(), ranges=Mse()))[0]
    full = group_qparams(weight, QuantSpec(3, symmetric, PerChannel(), ranges=MinMax()))[0]
    assert (searched <= full).all()
    assert (searched < full).any()
