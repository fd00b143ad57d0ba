"""Working on a matrix strip by strip changes nothing; 8-bit floats that are looked up are what torch makes of them."""

from __future__ import annotations

import pytest
import torch

from llmc.quant import PerBlock, PerChannel, PerGroup, PerTensor, QuantSpec, quantize_weight, squared_norm, strips
from llmc.quant.floats import widened
from llmc.quant.shares import clipped_share, zero_share

SPECS = {
    "rows": QuantSpec(bits=4, symmetric=False, granularity=PerChannel()),
    "groups": QuantSpec(bits=3, symmetric=True, granularity=PerGroup(8)),
    "tensor": QuantSpec(bits=8, symmetric=False, granularity=PerTensor()),
    "blocks": QuantSpec(bits=8, symmetric=True, grid="e4m3", granularity=PerBlock(16)),
    "e2m1": QuantSpec(bits=4, symmetric=True, grid="e2m1", granularity=PerGroup(8), scale_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", SPECS)
def test_strips_give_what_the_whole_gives(name, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(40, 24)
    quantized = quantize_weight(weight, SPECS[name])
    whole = quantized.dequantize(), clipped_share(weight * 1.2, quantized), zero_share(quantized)
    monkeypatch.setattr(strips, "_AT_ONCE", 72)  # three rows, or one of blocks
    parts = [rows for rows, _ in quantized.strips()]
    assert [rows.start for rows in parts] == list(range(0, 40, 16 if name == "blocks" else 3))
    assert torch.equal(quantized.dequantize(), whole[0])
    assert (clipped_share(weight * 1.2, quantized), zero_share(quantized)) == whole[1:]
    assert whole[1] > 0


def test_a_squared_norm_is_that_of_float64(monkeypatch):
    torch.manual_seed(0)
    one, other = torch.randn(50, 30), torch.randn(50, 30).bfloat16()
    monkeypatch.setattr(strips, "_AT_ONCE", 100)
    assert squared_norm(one) == pytest.approx(float(one.double().square().sum()), rel=1e-7)
    assert squared_norm(one, other) == pytest.approx(float((one.double() - other.double()).square().sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_looking_up_is_converting(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
    for seen in (codes, codes.T, codes[:, ::2], codes[3, 4]):
        assert torch.equal(widened(seen).view(torch.int32), seen.float().view(torch.int32))
