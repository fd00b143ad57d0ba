"""Inputs are rounded as the backends round them; static ranges come from all tokens, however they are batched."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs_fake
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam
from torch import Tensor, nn

from llmc.quant import (
    ActSpec,
    HistogramMse,
    InputQuantizer,
    InputRange,
    MovingMinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    StaticMinMax,
    fake_quantize_inputs,
    static_qparams,
)
from llmc.quant import linear as linear_module

E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
INT = {"type": "int", "dynamic": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
SHARED = {"token": (PerToken(), {"strategy": "token"}), "tensor": (PerTensor(), {"strategy": "tensor"})}
SHARED["group"] = (PerGroup(16), {"strategy": "group", "group_size": 16})
MX = {"type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}


def inputs(*shape: int, seed: int = 0) -> Tensor:
    """Tokens of different size with a few channels that are far larger and mostly positive."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator) * torch.exp(torch.randn(*shape[:-1], 1, generator=generator))
    made[..., 3] = made[..., 3] * 20 + 15
    return made


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shared", SHARED)
def test_dynamic_integers_are_those_of_compressed_tensors(shared, bits, symmetric):
    granularity, strategy = SHARED[shared]
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, **INT, **strategy)
    x = inputs(2, 5, 64)
    theirs = theirs_fake(x.clone(), *compute_dynamic_scales_and_zp(x, args, nn.Identity()), args)
    spec = ActSpec(QuantSpec(bits, symmetric, granularity, sym_mode="gptq"))  # theirs is absmax / 127.5
    torch.testing.assert_close(fake_quantize_inputs(x, spec), theirs, rtol=1e-6, atol=1e-6)


def test_symmetric_integers_reach_127_as_in_vllm():
    x = inputs(2, 5, 64)
    rounded = fake_quantize_inputs(x, ActSpec(QuantSpec(8, True, PerToken()))).double()
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert torch.equal((rounded / scale).round(), (x.double() / scale).round())
    assert ((rounded - x).abs() <= scale / 2 * (1 + 1e-6)).all()
    assert torch.equal(rounded.abs().amax(-1).float(), x.abs().amax(-1))


@pytest.mark.parametrize("shared", SHARED)
def test_dynamic_fp8_is_that_of_compressed_tensors(shared):
    granularity, strategy = SHARED[shared]
    args = QuantizationArgs(**FP8, **strategy)
    x = inputs(2, 5, 64)
    theirs = theirs_fake(x.clone(), *compute_dynamic_scales_and_zp(x, args, nn.Identity()), args)
    assert torch.equal(fake_quantize_inputs(x, ActSpec(QuantSpec.floating("e4m3", granularity))), theirs)


@pytest.mark.parametrize(("bits", "grid"), [(4, "e2m1"), (8, "e4m3")])
def test_dynamic_mx_is_that_of_compressed_tensors(bits, grid):
    args = QuantizationArgs(num_bits=bits, dynamic=True, **MX)
    x = inputs(3, 64)
    theirs = theirs_fake(x.clone(), *compute_dynamic_scales_and_zp(x, args, nn.Identity()), args)
    assert torch.equal(fake_quantize_inputs(x, ActSpec(QuantSpec.floating(grid, PerGroup(32), E8M0))), theirs)


def test_nvfp4_has_dynamic_group_scales_over_a_calibrated_global_one():
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, dynamic="local", scale_dtype=E4M3
    )
    calibration, x = inputs(8, 64, seed=1), inputs(3, 64)
    found = InputRange(float(calibration.min()), float(calibration.max()))
    whole = generate_gparam(calibration.min(), calibration.max())
    scale, zero = compute_dynamic_scales_and_zp(x, args, nn.Identity(), global_scale=whole)
    spec = ActSpec(QuantSpec.floating("e2m1", PerGroup(16), E4M3), StaticMinMax())
    assert torch.equal(fake_quantize_inputs(x, spec, found), theirs_fake(x.clone(), scale, zero, args, whole))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_static_range_is_one_scale_for_all_inputs(symmetric):
    spec = ActSpec(QuantSpec(8, symmetric, PerTensor()), StaticMinMax())
    found = InputRange(-1.5, 3.0)
    scale, zero = (float(part) for part in static_qparams(found, spec.grid))
    expected_scale = 3 / 127 if symmetric else 4.5 / 255
    assert scale == pytest.approx(expected_scale, rel=1e-7)
    assert zero == (0 if symmetric else round(-128 + 1.5 / expected_scale))
    x = torch.linspace(-9, 9, 1001)[None]
    codes = ((x / scale).round() + zero).clamp(-128, 127)
    assert torch.equal(fake_quantize_inputs(x, spec, found), (codes - zero) * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_of_the_input_stays(dtype):
    x = inputs(4, 32).to(dtype)
    rounded = fake_quantize_inputs(x, ActSpec(QuantSpec(8, True, PerToken())))
    assert rounded.dtype == dtype
    assert torch.equal(rounded, fake_quantize_inputs(x.float(), ActSpec(QuantSpec(8, True, PerToken()))).to(dtype))


def test_zeros_stay_zeros():
    for grid in (
        QuantSpec(8, True, PerToken()),
        QuantSpec(8, False, PerToken()),
        QuantSpec.floating("e4m3", PerToken()),
    ):
        assert torch.equal(fake_quantize_inputs(torch.zeros(2, 8), ActSpec(grid)), torch.zeros(2, 8))


def test_what_no_backend_has_is_no_spec():
    with pytest.raises(ValueError, match="static"):
        ActSpec(QuantSpec(8, True, PerToken()), StaticMinMax())
    with pytest.raises(ValueError, match="static"):
        ActSpec(QuantSpec.floating("e2m1", PerGroup(16), E4M3))
    with pytest.raises(ValueError, match="per token"):
        ActSpec(QuantSpec(8, True, PerChannel()))
    with pytest.raises(ValueError, match="calibrated range"):
        fake_quantize_inputs(torch.ones(1, 4), ActSpec(QuantSpec(8, True, PerTensor()), StaticMinMax()))


# --- observers -----------------------------------------------------------------------------------------------------

PER_TENSOR = QuantSpec(8, False, PerTensor())


def accumulated(observer, batches, spec=PER_TENSOR):
    seen = observer.accumulator(spec)
    for batch in batches:
        seen.update(batch)
    return seen.range()


def test_minmax_is_that_of_all_tokens():
    x = inputs(7, 5, 16)
    for batches in ([x], list(x.split(2)), list(x), [x.flatten(0, 1)]):
        assert accumulated(StaticMinMax(), batches) == (float(x.min()), float(x.max()))


def test_moving_minmax_averages_over_sequences_not_over_batches():
    x = inputs(7, 5, 16)
    lo, hi = x[0].min().double(), x[0].max().double()
    for sequence in x[1:]:
        lo, hi = 0.99 * lo + 0.01 * sequence.min(), 0.99 * hi + 0.01 * sequence.max()
    whole, parts = accumulated(MovingMinMax(), [x]), accumulated(MovingMinMax(), list(x.split(3)))
    assert whole == parts == (pytest.approx(float(lo), rel=1e-6), pytest.approx(float(hi), rel=1e-6))


def exhaustive(x: Tensor, spec: QuantSpec, ends: list[tuple[float, float]]) -> float:
    """The least squared error, in float64 and by the definition of the grid, among ranges."""
    best = torch.inf
    for lo, hi in ends:
        if spec.symmetric:
            scale, zero = max(-lo, hi) / (2 ** (spec.bits - 1) - 1), 0
        else:
            scale = (hi - lo) / (2**spec.bits - 1)
            zero = -(2 ** (spec.bits - 1)) - round(lo / scale)
        codes = ((x.double() / scale).round() + zero).clamp(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1)
        best = min(best, float(((codes - zero) * scale - x.double()).square().sum()))
    return best


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_histogram_finds_a_range_as_good_as_an_exhaustive_search_over_the_values(symmetric, bits):
    x = inputs(40, 16, 16)[..., 4:]  # its tails are heavy
    spec = QuantSpec(bits, symmetric, PerTensor())
    lo, hi = float(x.min()), float(x.max())
    shares = [step / 40 for step in range(1, 41)]
    ends = [(lo * a, hi * b) for a in shares for b in shares]
    found = exhaustive(x, spec, [accumulated(HistogramMse(), list(x.split(8)), spec)])
    assert found <= exhaustive(x, spec, ends) * 1.03
    assert found < exhaustive(x, spec, [(lo, hi)]) * (0.8 if bits == 4 else 0.98)


def test_the_histogram_depends_neither_on_the_order_nor_on_the_batches():
    x = inputs(12, 5, 16)
    whole = accumulated(HistogramMse(bins=256), [x])
    assert accumulated(HistogramMse(bins=256), list(x)) == whole
    assert accumulated(HistogramMse(bins=256), list(x.flip(0).split(5))) == whole


def test_the_histogram_counts_every_value_in_its_bin():
    seen = HistogramMse(bins=64).accumulator(PER_TENSOR)
    x = inputs(9, 5, 16)
    for batch in x.split(2):
        seen.update(batch)
    width = 2.0**seen._exponent
    expected = torch.histc(x, len(seen._counts), seen._first * width, (seen._first + len(seen._counts)) * width)
    assert 32 <= len(seen._counts) <= 64
    assert torch.equal(seen._counts, expected.long())


@pytest.mark.parametrize("observer", [StaticMinMax(), MovingMinMax(), HistogramMse()])
def test_odd_inputs(observer):
    assert accumulated(observer, []) == (0.0, 0.0)
    assert accumulated(observer, [torch.zeros(2, 3, 4)]) == (0.0, 0.0)
    lo, hi = accumulated(observer, [torch.full((2, 3, 4), 5.0)])
    assert lo in (0.0, 5.0) and hi == 5.0
    accumulated(observer, [torch.tensor([[[torch.inf, torch.nan]]])])  # the engine refuses the block
    lo, hi = accumulated(observer, [torch.tensor([[[-3e38, 3e38]]])])
    assert -3.01e38 < lo < 0 < hi < 3.01e38


# --- in a model ----------------------------------------------------------------------------------------------------


def test_a_linear_multiplies_the_rounded_input_once_switched_on():
    linear, x = nn.Linear(16, 4), inputs(2, 5, 16)
    quantizer = InputQuantizer(ActSpec(QuantSpec(4, True, PerToken())))
    linear.register_forward_pre_hook(quantizer)
    plain = nn.functional.linear(x, linear.weight, linear.bias)
    assert torch.equal(linear(x), plain)
    quantizer.switch_on(None)
    rounded = nn.functional.linear(fake_quantize_inputs(x, quantizer.spec), linear.weight, linear.bias)
    assert torch.equal(linear(x), rounded)
    assert torch.equal(
        linear(x * 2), nn.functional.linear(fake_quantize_inputs(x * 2, quantizer.spec), linear.weight, linear.bias)
    )
    assert not torch.equal(rounded, plain)


def test_an_input_is_rounded_once_for_all_its_readers_and_again_when_it_was_written_to(monkeypatch):
    rounded = []
    monkeypatch.setattr(linear_module, "fake_quantize_inputs", lambda x, *rest: (rounded.append(1), x.round())[1])
    quantizer, module = InputQuantizer(ActSpec(QuantSpec(8, True, PerToken())), readers=3), nn.Identity()
    quantizer.switch_on(None)
    x, y = torch.full((1, 2), 1.4), torch.full((1, 2), 5.4)
    assert [float(quantizer(module, (x,))[0][0, 0]) for _ in range(3)] == [1, 1, 1]
    assert len(rounded) == 1
    assert quantizer._kept is None  # nothing is held behind the last reader
    assert [float(quantizer(module, (z,))[0][0, 0]) for z in (x, y, x)] == [1, 5, 1]
    x += 2
    assert float(quantizer(module, (x,))[0][0, 0]) == 3


def test_a_static_quantizer_needs_its_range():
    quantizer = InputQuantizer(ActSpec(QuantSpec(8, True, PerTensor()), StaticMinMax()))
    with pytest.raises(ValueError, match="calibrated range"):
        quantizer.switch_on(None)
    quantizer.switch_on(InputRange(-1.0, 1.0))
    (rounded,) = quantizer(nn.Identity(), (torch.tensor([[3.0]]),))
    assert rounded.item() == 1.0
