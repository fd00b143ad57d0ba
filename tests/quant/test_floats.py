"""Float grids are those of the hardware: torch's casts over all codes, compressed-tensors' scales and products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs_fake
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from llmc.quant import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    bind_global_scale,
    fake_quantize_weight,
    from_groups,
    global_scale_of,
    over_rows,
    quantize_weight,
    to_groups,
)
from llmc.quant.floats import LARGEST, nearest

E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
MX = {"type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
NV = {"type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16, "scale_dtype": E4M3}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
SCHEMES = {
    "fp8 tensor": (QuantSpec.floating("e4m3", PerTensor()), QuantizationArgs(**FP8, strategy="tensor")),
    "fp8 channel": (QuantSpec.floating("e4m3", PerChannel()), QuantizationArgs(**FP8, strategy="channel")),
    "fp8 group": (QuantSpec.floating("e4m3", PerGroup(32)), QuantizationArgs(**FP8, strategy="group", group_size=32)),
    "fp8 block": (
        QuantSpec.floating("e4m3", PerBlock(32)),
        QuantizationArgs(**FP8, strategy="block", block_structure=[32, 32]),
    ),
    "mxfp8": (QuantSpec.floating("e4m3", PerGroup(32), E8M0), QuantizationArgs(num_bits=8, **MX)),
    "mxfp4": (QuantSpec.floating("e2m1", PerGroup(32), E8M0), QuantizationArgs(num_bits=4, **MX)),
    "nvfp4": (QuantSpec.floating("e2m1", PerGroup(16), E4M3), QuantizationArgs(num_bits=4, **NV)),
}
FORMATS = {"mxfp8": "mxfp8-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}


def values(grid: str) -> Tensor:
    """Every finite value of a grid."""
    if grid == "e2m1":
        return torch.tensor([-value for value in FP4] + FP4)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(DTYPES[grid]).float()
    return codes[codes.isfinite()]


def weights(rows: int = 48, columns: int = 96) -> Tensor:
    """Rows of very different size, one of zeros, one group of zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.exp(3 * torch.randn(rows, 1, generator=generator))
    weight[3], weight[5, :32] = 0, 0
    return weight


def their_qparams(weight: Tensor, spec: QuantSpec, args: QuantizationArgs) -> tuple[Tensor, Tensor | None]:
    groups = to_groups(weight, spec)
    whole = generate_gparam(weight.min(), weight.max()) if spec.is_nvfp4 else None
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=whole)
    return scale, whole


@pytest.mark.parametrize("grid", LARGEST)
def test_every_value_of_a_grid_stays_and_the_next_float_above_the_middle_goes_up(grid):
    found = values(grid).unique()
    assert torch.equal(nearest(found, grid), found)
    assert found.max() == LARGEST[grid] == -found.min()
    middle = (found[1:].double() + found[:-1].double()).div(2).float()  # exact
    assert torch.equal(nearest(middle.nextafter(found[1:]), grid), found[1:])
    assert torch.equal(nearest(middle.nextafter(found[:-1]), grid), found[:-1])


@pytest.mark.parametrize("grid", DTYPES)
def test_eight_bits_are_torch_s_cast_and_saturate(grid):
    bits = torch.arange(-(2**31), 2**31, 9973, dtype=torch.int64).to(torch.int32).view(torch.float32)
    inside = bits[bits.abs() <= LARGEST[grid]]
    assert len(inside) > 10**5
    assert torch.equal(nearest(inside, grid), inside.to(DTYPES[grid]).float())
    outside = torch.tensor([1.0, -1.0]) * torch.tensor([[LARGEST[grid] * 1.001], [1e30], [torch.inf]])
    assert torch.equal(nearest(outside, grid), outside.sign() * LARGEST[grid])


def test_four_bits_are_compressed_tensors_cast_ties_included():
    ticks = torch.arange(-800, 801) / 100  # holds every middle
    assert torch.equal(nearest(ticks, "e2m1"), FP4_E2M1_DATA.cast_to_fp4(ticks.clamp(-6, 6)))
    assert nearest(torch.tensor([-0.1]), "e2m1").signbit()


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_those_of_compressed_tensors(name):
    spec, args = SCHEMES[name]
    weight = weights()
    ours = quantize_weight(weight, spec)
    scale, whole = their_qparams(weight, spec, args)
    theirs = theirs_fake(weight.clone(), scale.squeeze(-1) if name == "fp8 tensor" else scale, None, args, whole)
    assert torch.equal(ours.dequantize(), theirs)
    assert ours.scale.dtype == spec.scale_dtype
    assert ours.scale.shape == spec.scale_shape(*weight.shape)
    used = ours.scale.float() != 1  # where all weights are 0, any scale does
    assert torch.equal(ours.scale.float()[used], scale.float()[used])


@pytest.mark.parametrize("name", FORMATS)
def test_compressed_tensors_stores_the_weights_that_we_evaluate(name):
    spec, args = SCHEMES[name]
    weight = weights().bfloat16().float()
    scale, whole = their_qparams(weight, spec, args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=FORMATS[name])
    compressor = BaseCompressor.get_value_from_registry(FORMATS[name])
    state = {"weight": weight, "weight_scale": scale} | ({"weight_global_scale": whole} if whole is not None else {})
    dense = compressor.decompress(compressor.compress(state, scheme), scheme)["weight"]
    assert torch.equal(quantize_weight(weight, spec).dequantize().bfloat16(), dense.bfloat16())


def test_an_mx_scale_is_the_least_power_of_two_that_cuts_little():
    spec = SCHEMES["mxfp4"][0]
    for largest, scale in [(6.0, 1.0), (6.99, 1.0), (7.0, 2.0), (8.0, 2.0), (4.0, 1.0), (3.99, 1.0), (3.49, 0.5)]:
        weight = torch.zeros(1, 32)
        weight[0, 7] = -largest
        assert quantize_weight(weight, spec).scale.float().item() == scale


def test_nvfp4_fills_the_range_of_its_scales_and_shares_one_global_scale():
    spec, (left, right) = SCHEMES["nvfp4"][0], (weights(), weights() / 7)
    shared = bind_global_scale(spec, [left, right])
    assert shared.global_scale == pytest.approx(448 * 6 / float(left.abs().max()))
    assert quantize_weight(left, shared).scale.float().max() == 448
    assert quantize_weight(right, shared).scale.float().max() < 100
    assert quantize_weight(right, spec).scale.float().max() == 448
    assert bind_global_scale(SCHEMES["mxfp4"][0], [left]) == SCHEMES["mxfp4"][0]
    assert bind_global_scale(spec, [torch.zeros(2, 16)]).global_scale == 1.0
    with pytest.raises(ValueError, match="bind NVFP4"):
        fake_quantize_weight.__globals__["group_qparams"](left, spec)


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_and_scales_stand_for_the_fake_quantized_weight(name):
    spec, weight = SCHEMES[name][0], weights()
    quantized = quantize_weight(weight, spec)
    assert torch.equal(quantized.dequantize(), fake_quantize_weight(weight, spec))
    assert set(quantized.codes.float().flatten().tolist()) <= set(values(spec.grid).tolist())
    again = quantize_weight(quantized.dequantize(), quantized.spec)
    if "fp4" not in name and name != "mxfp8":  # their scales are rounded, so the largest weight isn't on the grid's end
        assert torch.equal(again.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("shape", [(64, 96), (70, 50), (3, 5)])
def test_square_blocks_may_be_cut_at_the_edges(shape):
    spec, weight = QuantSpec.floating("e4m3", PerBlock(32)), torch.randn(shape)
    groups = to_groups(weight, spec)
    assert torch.equal(from_groups(groups, weight.shape, spec), weight)
    quantized = quantize_weight(weight, spec)
    for down in range(0, shape[0], 32):
        for across in range(0, shape[1], 32):
            block = weight[down : down + 32, across : across + 32]
            scale = quantized.scale[down // 32, across // 32]
            assert scale == block.abs().max() / 448
            expected = (block / scale).to(torch.float8_e4m3fn).float() * scale
            assert torch.equal(quantized.dequantize()[down : down + 32, across : across + 32], expected)
    by_row = over_rows(quantized.scale, weight.shape, spec)
    assert by_row.shape == (shape[0], quantized.scale.shape[1])
    assert torch.equal(by_row[-1], quantized.scale[-1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 8},
        {"symmetric": False},
        {"grid": "int"},
        {"grid": "e4m3", "bits": 8, "scale_dtype": E4M3},
    ],
    ids=str,
)
def test_what_no_format_has_is_no_spec(wrong):
    with pytest.raises(ValueError, match=r"bits|scales"):
        replace(SCHEMES["nvfp4"][0], **wrong)


@pytest.mark.parametrize(
    ("name", "said"), [("mxfp4", "W4 mxfp4"), ("nvfp4", "W4 nvfp4"), ("fp8 block", "W8 e4m3 block32")]
)
def test_descriptions(name, said):
    assert SCHEMES[name][0].describe() == said


@pytest.mark.parametrize("exponent", [-20, -3, 0, 5])
def test_the_reciprocal_of_a_global_scale_tells_the_scale(exponent):
    generator = torch.Generator().manual_seed(exponent + 100)
    for magnitude in (torch.rand(200, generator=generator) + 0.5) * 2.0**exponent:
        whole = torch.tensor(global_scale_of(float(magnitude)))
        assert torch.equal(whole.reciprocal().reciprocal(), whole)
        assert float(whole) == pytest.approx(448 * 6 / float(magnitude), rel=2e-7)


def test_weights_that_are_run_as_one_share_the_scale_of_a_tensor():
    spec = SCHEMES["fp8 tensor"][0]
    left, right = torch.randn(8, 32), 3 * torch.randn(4, 32)
    shared = bind_global_scale(spec, [left, right])
    largest = max(float(left.abs().max()), float(right.abs().max()))
    weights = [quantize_weight(weight, shared) for weight in (left, right)]
    assert [float(weight.scale) for weight in weights] == [pytest.approx(largest / 448, rel=1e-6)] * 2
    assert torch.equal(weights[0].scale, weights[1].scale)
    assert torch.equal(fake_quantize_weight(left, shared), weights[0].dequantize())
    own = quantize_weight(left, spec)
    assert float(own.scale) == pytest.approx(float(left.abs().max()) / 448, rel=1e-6)
    assert bind_global_scale(shared, [left]) == spec
    for name in ("fp8 channel", "fp8 group", "mxfp4"):
        assert bind_global_scale(SCHEMES[name][0], [left, right]) == SCHEMES[name][0]
    assert bind_global_scale(QuantSpec(8, True, PerTensor()), [left, right]).shared_range is None
