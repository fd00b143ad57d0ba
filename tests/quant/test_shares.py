"""Shares of clipped and zero values against the grid's definition, weight by weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmc.quant import (
    ActSpec,
    InputRange,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    QWeight,
    StaticMinMax,
    clipped_inputs,
    clipped_share,
    quantize_weight,
    zero_share,
)
from llmc.quant.affine import find_ranges, qparams
from llmc.quant.groups import to_groups

SPECS = [
    QuantSpec(4, symmetric=False, granularity=PerGroup(8), scale_dtype=torch.bfloat16),
    QuantSpec(3, symmetric=True, granularity=PerChannel(), sym_mode="gptq"),
    QuantSpec(8, symmetric=True, granularity=PerTensor()),
    QuantSpec(4, symmetric=True, granularity=PerGroup(16), sym_mode="full"),  # scales of either sign
    QuantSpec.floating("e4m3", PerBlock(16)),
    QuantSpec.floating("e2m1", PerGroup(16), scale_dtype=torch.float8_e4m3fn),
]


def weight(rows: int = 24, columns: int = 32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) ** 3


def clipped(shrink: float, spec: QuantSpec) -> tuple[Tensor, QWeight]:
    """A weight on a grid whose ranges are shrunk."""
    values = weight()
    if spec.is_nvfp4:
        spec = replace(spec, global_scale=448 * 6 / float(values.abs().max()))
    lo, hi = (end.squeeze(-1) * shrink for end in find_ranges(to_groups(values, spec), spec))
    return values, quantize_weight(values, spec, qparams(lo, hi, spec))


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
@pytest.mark.parametrize("shrink", [0.5, 0.2])
def test_a_clipped_weight_is_farther_from_its_code_than_rounding_brings_it(spec, shrink):
    values, quantized = clipped(shrink, spec)
    found = clipped_share(values, quantized)
    # A value is within the grid if one of its grid's points, with one further step at either end, would take it.
    beyond = 0
    step = {"e4m3": 32.0, "e2m1": 2.0}.get(spec.grid, 1.0)
    ends = {"e4m3": (-448.0, 448.0), "e2m1": (-6.0, 6.0)}.get(spec.grid, (spec.qmin, spec.qmax))
    exact = replace(quantized, spec=replace(quantized.spec, exact_product=True))
    lo, hi = (
        replace(exact, codes=torch.full_like(quantized.codes.float(), end).to(quantized.codes.dtype)).dequantize()
        for end in ends
    )
    lo, hi = torch.minimum(lo, hi), torch.maximum(lo, hi)
    unit = (hi - lo) / (ends[1] - ends[0]) * step / 2
    for value, low, high, half in zip(*(t.flatten().tolist() for t in (values, lo, hi, unit)), strict=True):
        beyond += value > high + half or value < low - half
    assert 0 < found == pytest.approx(beyond / values.numel(), abs=1e-9)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
def test_zero_weights_are_those_that_come_out_zero(spec):
    _, quantized = clipped(1.0, spec)
    assert zero_share(quantized) == pytest.approx(float((quantized.dequantize() == 0).double().mean())) != 0


def test_a_range_of_all_values_clips_nothing():
    values = weight()
    assert clipped_share(values, quantize_weight(values, SPECS[2])) == 0


def test_groups_of_scattered_columns():
    values, order = weight(4, 32), torch.randperm(32, generator=torch.Generator().manual_seed(1))
    spec = QuantSpec(2, symmetric=False, granularity=PerGroup(8))
    lo, hi = (end.squeeze(-1) / 2 for end in find_ranges(to_groups(values, spec), spec))
    plain = quantize_weight(values, spec, qparams(lo, hi, spec))
    scattered = replace(plain, group_index=(torch.arange(32) // 8).int()).reordered(None, order)
    assert clipped_share(values[:, order], scattered) == clipped_share(values, plain) > 0
    assert zero_share(scattered) == zero_share(plain) > 0


def test_inputs_beyond_a_static_range():
    grid = QuantSpec(8, symmetric=True, granularity=PerTensor())
    spec = ActSpec(grid, StaticMinMax())
    inputs = torch.tensor([[-1.5, -1.0, 0.0], [1.0, 1.003, 1.005]])
    # Steps of 1/127: the last code that holds is 127, on the other side -128, each with half a step.
    expected = torch.tensor([[True, False, False], [False, False, True]])
    assert torch.equal(clipped_inputs(inputs, spec, InputRange(-1.0, 1.0)), expected)


def test_inputs_beyond_what_a_global_scale_was_made_for():
    spec = ActSpec(QuantSpec.floating("e2m1", PerGroup(16), scale_dtype=torch.float8_e4m3fn), StaticMinMax())
    assert clipped_inputs(torch.tensor([-2.1, 2.0, 2.1]), spec, InputRange(-2.0, 1.0)).tolist() == [True, False, True]
