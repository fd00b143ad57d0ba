"""The conventions ``gptq`` and asymmetric are those of the compressed-tensors library, to the code."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

from llmc.quant import PerChannel, PerGroup, QuantSpec, quantize_weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(16)])
@pytest.mark.parametrize("offset", [0.0, 3.0, -3.0])
def test_scales_zero_points_codes_and_weights_are_the_same(symmetric, bits, granularity, offset):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(bits)) + offset
    spec = QuantSpec(bits, symmetric, granularity, sym_mode="gptq")
    ours = quantize_weight(weight, spec)

    size = spec.group_size(64)
    grouped = {"strategy": "channel"} if size == 64 else {"strategy": "group", "group_size": size}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **grouped)
    groups = weight.reshape(24, -1, size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = quantize(weight, scale, zero, args)

    torch.testing.assert_close(ours.scale, scale, rtol=2e-7, atol=0)
    assert symmetric or torch.equal(ours.zero, zero.to(torch.int8))
    assert torch.equal(ours.codes, codes.to(torch.int8))
    theirs = dequantize(ours.codes, ours.scale, None if symmetric else ours.zero, args)
    assert torch.equal(ours.dequantize(), theirs.float())
