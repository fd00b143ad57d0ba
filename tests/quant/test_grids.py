"""Integer grids: properties for arbitrary weights, closed forms for a few."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmc.quant import (
    MinMax,
    Mse,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    fake_quantize_weight,
    group_qparams,
    quantize_weight,
    to_groups,
)
from llmc.quant.affine import qparams

GRANULARITIES = [PerTensor(), PerChannel(), PerGroup(4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [(False, "restricted"), (True, "restricted"), (True, "gptq"), (True, "full")]

values = st.floats(-1e4, 1e4, width=32)
weights = st.lists(st.lists(values, min_size=8, max_size=8), min_size=1, max_size=3).map(torch.tensor)


@st.composite
def specs(draw, grids=GRIDS, dtypes=DTYPES) -> QuantSpec:
    symmetric, mode = draw(st.sampled_from(grids))
    return QuantSpec(
        bits=draw(st.integers(2, 8)),
        symmetric=symmetric,
        granularity=draw(st.sampled_from(GRANULARITIES)),
        sym_mode=mode,
        scale_dtype=draw(st.sampled_from(dtypes)),
    )


def grid_points(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Everything that the grid of each group can express, ``[rows, groups, 2^bits]`` in float64."""
    scale, zero = group_qparams(weight, spec)
    codes = torch.arange(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1), dtype=torch.float64)
    return (codes - zero[..., None]) * scale[..., None].double()


@settings(deadline=None)
@given(weights, specs())
def test_every_value_goes_to_the_nearest_of_all_grid_points(weight, spec):
    groups, points = to_groups(weight, spec).double(), grid_points(weight, spec)
    rounded = to_groups(fake_quantize_weight(weight, spec), spec)
    nearest = (groups[..., None] - points[..., None, :]).abs().amin(-1)
    slack = 1e-4 * group_qparams(weight, spec)[0].abs()[..., None]
    assert ((groups - rounded).abs() <= nearest + slack).all()


@settings(deadline=None)
@given(weights, specs())
def test_values_within_reach_move_by_at_most_half_a_step(weight, spec):
    groups, points = to_groups(weight, spec), grid_points(weight, spec)
    inside = (groups >= points.amin(-1, keepdim=True)) & (groups <= points.amax(-1, keepdim=True))
    step = group_qparams(weight, spec)[0].abs()[..., None]
    moved = (groups - to_groups(fake_quantize_weight(weight, spec), spec)).abs()
    assert (moved <= step * 0.5001)[inside].all()


@settings(deadline=None)
@given(weights, specs(grids=[(False, "restricted"), (True, "restricted"), (True, "gptq")], dtypes=[torch.float32]))
def test_an_exact_scale_reaches_both_ends_of_the_range(weight, spec):
    step = group_qparams(weight, spec)[0].abs()[..., None]
    moved = (to_groups(weight, spec) - to_groups(fake_quantize_weight(weight, spec), spec)).abs()
    assert (moved <= step * 0.5001).all()


@settings(deadline=None)
@given(weights, specs())
def test_zero_is_a_grid_point(weight, spec):
    assert (grid_points(weight, spec) == 0).any(-1).all()


@settings(deadline=None)
@given(weights, specs())
def test_codes_come_from_the_stored_scale_so_rounding_twice_changes_nothing(weight, spec):
    scale, zero = group_qparams(weight, spec)
    first = quantize_weight(weight, spec)
    assert first.scale.dtype == spec.scale_dtype
    assert torch.equal(first.scale.float(), scale)
    exact = replace(first, spec=replace(spec, exact_product=True))  # 16 bits don't tell all 8-bit codes apart
    again = quantize_weight(exact.dequantize(), spec, (first.scale.float(), zero))
    assert torch.equal(again.codes, first.codes)
    assert torch.equal(first.dequantize(), fake_quantize_weight(weight, spec).to(spec.scale_dtype).float())


@settings(deadline=None)
@given(weights, specs())
def test_codes_fit_their_bits(weight, spec):
    codes = quantize_weight(weight, spec).codes
    assert codes.min() >= -(2 ** (spec.bits - 1))
    assert codes.max() <= 2 ** (spec.bits - 1) - 1


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-6, 1.0, 1e6, 3e38])
@pytest.mark.parametrize(("symmetric", "mode"), GRIDS)
def test_odd_groups_give_finite_weights(symmetric, mode, size):
    rows = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [-1, -1, -1, -1], [0, 0, 0, 1], [-1, 1, -1, 1]]) * size
    holding = [dtype for dtype in DTYPES if torch.finfo(dtype).max >= size]
    for bits, dtype, ranges in product([2, 4, 8], holding, [MinMax(), Mse()]):
        spec = QuantSpec(bits, symmetric, PerChannel(), mode, ranges, scale_dtype=dtype)
        weight = quantize_weight(rows, spec)
        assert weight.scale.isfinite().all()
        assert (weight.scale != 0).all()
        assert weight.dequantize().isfinite().all()
        assert (weight.dequantize()[0] == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_one_signed_asymmetric_group_keeps_its_far_end(sign):
    weight = sign * torch.tensor([[5.0, 6.0, 7.0, 7.5]])
    assert torch.equal(fake_quantize_weight(weight, QuantSpec(4, False, PerChannel())), weight)  # the step is 1/2


@pytest.mark.parametrize(
    ("mode", "weight", "scale", "codes"),
    [
        ("restricted", [-3.5, 1.0, 0.2, 3.0], 0.5, [-7, 2, 0, 6]),
        ("gptq", [-3.75, 1.0, 0.2, 3.0], 0.5, [-8, 2, 0, 6]),
        ("full", [-4.0, 1.0, 0.2, 3.0], 0.5, [-8, 2, 0, 6]),
        ("full", [4.0, 1.0, -0.2, -3.0], -0.5, [-8, -2, 0, 6]),
        ("full", [4.0, -4.0, 0.0, 0.0], 0.5, [7, -8, 0, 0]),
    ],
)
def test_symmetric_scales_by_hand(mode, weight, scale, codes):
    result = quantize_weight(torch.tensor([weight]), QuantSpec(4, True, PerChannel(), mode))
    assert result.scale.tolist() == [[scale]]
    assert result.codes.tolist() == [codes]
    assert result.zero is None


def test_asymmetric_scale_and_zero_point_by_hand():
    result = quantize_weight(torch.tensor([[-1.0, 0.0, 0.3, 2.75]]), QuantSpec(4, False, PerChannel()))
    assert result.scale.tolist() == [[0.25]]  # 3.75 / 15
    assert result.zero.tolist() == [[-4]]  # -8 + 1 / 0.25
    assert result.codes.tolist() == [[-8, -4, -3, 7]]


@pytest.mark.parametrize(("symmetric", "mode"), GRIDS)
def test_a_range_without_zero_is_widened_to_it(symmetric, mode):
    spec, zero = QuantSpec(4, symmetric, PerChannel(), mode), torch.zeros(1)
    for end in (torch.tensor([3.0]), torch.tensor([-3.0])):
        narrow, wide = sorted([end / 2, end]), sorted([zero, end])
        assert qparams(*narrow, spec) == qparams(*wide, spec)


def test_halves_round_to_even():
    halves, unit = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]]), (torch.ones(1, 1), torch.zeros(1, 1))
    assert quantize_weight(halves, QuantSpec(4, True, PerChannel()), unit).codes.tolist() == [[0, 2, 2, 0, -2]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("mode", ["restricted", "gptq", "full"])
def test_symmetric_scales_by_formula(bits, mode):
    lo, hi = torch.tensor([-2.0, -1.0]), torch.tensor([1.0, 3.0])
    half = 2 ** (bits - 1)
    expected = {
        "restricted": [2 / (half - 1), 3 / (half - 1)],
        "gptq": [4 / (2 * half - 1), 6 / (2 * half - 1)],
        "full": [2 / half, -3 / half],
    }[mode]
    scale, zero = qparams(lo, hi, QuantSpec(bits, True, PerChannel(), mode))
    torch.testing.assert_close(scale, torch.tensor(expected))
    assert (zero == 0).all()


@pytest.mark.parametrize(("symmetric", "mode"), GRIDS)
@pytest.mark.parametrize("ranges", [MinMax(), Mse()])
def test_a_group_is_a_row_of_its_own(symmetric, mode, ranges):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))

    def rounded(matrix: Tensor, granularity) -> Tensor:
        return fake_quantize_weight(matrix, QuantSpec(3, symmetric, granularity, mode, ranges)).reshape(6, 32)

    assert torch.equal(rounded(weight, PerGroup(8)), rounded(weight.reshape(24, 8), PerChannel()))
    assert torch.equal(rounded(weight, PerGroup(32)), rounded(weight, PerChannel()))
    assert torch.equal(rounded(weight, PerTensor()), rounded(weight.reshape(1, -1), PerChannel()))


def test_qparams_are_shaped_rows_by_groups():
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    shapes = {PerTensor(): (1, 1), PerChannel(): (6, 1), PerGroup(8): (6, 4)}
    for granularity, shape in shapes.items():
        result = quantize_weight(weight, QuantSpec(4, False, granularity))
        assert result.scale.shape == result.zero.shape == shape


def test_a_group_size_that_does_not_divide_the_columns_is_refused():
    with pytest.raises(ValueError, match="group size 24 doesn't divide 32"):
        quantize_weight(torch.zeros(2, 32), QuantSpec(4, True, PerGroup(24)))


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 8 bits"):
        QuantSpec(bits, True, PerChannel())
