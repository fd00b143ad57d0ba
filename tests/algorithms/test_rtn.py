"""Round-to-nearest as a method: what it delivers, and that it takes over clips."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmc.algorithms import ClipRatios
from llmc.algorithms.rtn import RTN, RTNOptions
from llmc.quant import PerChannel, PerGroup, QuantSpec


@pytest.mark.parametrize("spec", [QuantSpec(4, True, PerChannel()), QuantSpec(3, False, PerGroup(8))])
def test_every_linear_with_a_grid_is_rounded(make_view, nearest, spec):
    linears = {"q": nn.Linear(16, 8), "k": nn.Linear(16, 4)}
    view = make_view(linears, [torch.eye(16)], {"k": spec})
    RTN(RTNOptions()).subset(view)
    weight = linears["k"].weight.detach()
    expected = nearest(weight, spec)
    assert view.quantized.keys() == {"k"}
    torch.testing.assert_close(view.quantized["k"].dequantize(), expected)
    relative = (expected - weight).square().sum() / weight.square().sum()
    assert view.notes["k"].error == pytest.approx(relative.item(), rel=1e-4)


def test_clips_shrink_each_end_of_each_range(make_view, nearest):
    linear, spec = nn.Linear(16, 8), QuantSpec(4, False, PerGroup(8))
    lo, hi = torch.rand(2, 8, 2, generator=torch.Generator().manual_seed(0)) / 2 + 0.5
    view = make_view({"fc": linear}, [torch.eye(16)], spec)
    view.clips["fc"] = ClipRatios(lo, hi)
    RTN(RTNOptions()).subset(view)
    torch.testing.assert_close(view.quantized["fc"].dequantize(), nearest(linear.weight.detach(), spec, lo, hi))


def test_it_asks_for_no_data():
    assert not RTN(RTNOptions()).needs(quant_out=True).data
