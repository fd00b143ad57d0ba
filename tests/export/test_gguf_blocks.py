"""Every type of ggml that llmc writes holds the grids it's used for bit for bit, as the gguf package reads it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc.errors import ExportError
from llmc.export.gguf_blocks import BY_NAME, TYPES, find_type
from llmc.quant import PerBlock, PerChannel, PerGroup, PerTensor, QuantSpec, QWeight, quantize_weight

COLUMNS, GROUPS = 512, PerGroup(32)
GRANULARITIES = [PerGroup(32), PerGroup(64), PerGroup(96), PerGroup(256), PerChannel(), PerTensor()]


def half(bits, symmetric, granularity=GROUPS, mode="restricted", digits=None):
    return QuantSpec(
        bits, symmetric, granularity, mode, scale_dtype=torch.float16, exact_product=True, scale_digits=digits
    )


GRIDS = [
    half(bits, symmetric, granularity, mode, digits)
    for bits, (symmetric, mode), granularity, digits in product(
        range(2, 9), [(True, "restricted"), (True, "full"), (False, "restricted")], GRANULARITIES, [None, 7]
    )
    if (bits, symmetric) != (8, False)
]


def named(spec):
    return f"{spec.describe()} {spec.sym_mode} {spec.scale_digits or ''}"


def extreme_weight(spec: QuantSpec, columns: int, seed: int = 0) -> QWeight:
    """Any codes, zero points and scales that the grid has, its ends among them; scales may be negative or subnormal."""
    generator = torch.Generator().manual_seed(seed)
    shape = spec.scale_shape(16, columns)
    scale = torch.exp2(torch.rand(shape, generator=generator) * 30 - 24).half()
    scale = scale * torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1)
    if spec.scale_digits is not None:
        mantissa, exponent = torch.frexp(scale.float())
        scale = torch.ldexp((mantissa * 2**spec.scale_digits).trunc() / 2**spec.scale_digits, exponent).half()
    codes = torch.randint(spec.qmin, spec.qmax + 1, (16, columns), generator=generator, dtype=torch.int8)
    codes[:, ::17], codes[:, 5::19] = spec.qmin, spec.qmax
    zero = torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator, dtype=torch.int8)
    zero[::3], zero[1::3] = spec.qmin, spec.qmax
    return QWeight(codes, scale, None if spec.symmetric else zero, spec)


def dequantized(kind, packed):
    return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind.name]))


@pytest.mark.parametrize("spec", GRIDS, ids=named)
def test_a_type_holds_every_value_of_a_grid_exactly(spec):
    columns = 768 if spec.granularity == PerGroup(96) else COLUMNS
    kind = find_type(spec, columns)
    weights = [extreme_weight(spec, columns), quantize_weight(torch.randn(16, columns) + 0.2, spec)]
    for weight in weights:
        packed = kind.pack(weight)
        assert packed.shape == (16, columns // kind.size * kind.nbytes)
        assert torch.equal(dequantized(kind, packed), weight.dequantize())
        back = kind.unpack(packed, weight.zero, spec)
        assert torch.equal(back.codes, weight.codes)
        assert torch.equal(back.scale, weight.scale)
        assert back.scale.dtype == torch.float16


@pytest.mark.parametrize(
    ("bits", "symmetric", "narrow", "wide"),
    [
        (2, True, "Q4_0", "Q2_K"),
        (2, False, "Q4_0", "Q2_K"),
        (3, True, "Q4_0", "Q3_K"),
        (3, False, "Q4_0", "Q4_0"),
        (4, True, "Q4_0", "Q4_0"),
        (4, False, "Q5_0", "Q4_K"),
        (5, True, "Q5_0", "Q5_0"),
        (5, False, "Q8_0", "Q5_K"),
        (6, True, "Q8_0", "Q6_K"),
        (6, False, "Q8_0", "Q8_0"),
        (7, False, "Q8_0", "Q8_0"),
        (8, True, "Q8_0", "Q8_0"),
    ],
)
def test_the_smallest_type_is_taken(bits, symmetric, narrow, wide):
    for granularity, columns, name in [
        (PerGroup(32), 512, narrow),
        (PerGroup(128), 512, narrow),
        (PerChannel(), 544, narrow),  # 256 doesn't divide the row
        (PerGroup(256), 512, wide),
        (PerChannel(), 512, wide),
        (PerTensor(), 512, wide),
    ]:
        assert find_type(half(bits, symmetric, granularity), columns).name == name


def test_no_smaller_type_would_have_been_exact():
    """What `find_type` passes over as too narrow does lose values."""
    for spec in GRIDS:
        columns = 768
        chosen = find_type(spec, columns)
        run = spec.group_size(columns)
        for kind in TYPES:
            if kind.nbytes / kind.size >= chosen.nbytes / chosen.size or run % kind.size:
                continue
            weight = extreme_weight(spec, columns)
            try:
                packed = kind.pack(weight)
            except ExportError:
                continue
            assert not torch.equal(dequantized(kind, packed), weight.dequantize()), (kind.name, named(spec))


@pytest.mark.parametrize("digits", [1, 6, 7])
def test_seven_digits_of_a_scale_leave_room_for_four_of_a_zero_point(digits):
    assert find_type(half(4, False, digits=digits), 64).name == "Q4_1"
    assert find_type(half(4, False, digits=8), 64).name == "Q5_0"
    weight = extreme_weight(half(4, False, digits=None), 64)
    with pytest.raises(ExportError, match="isn't a float16"):
        BY_NAME["Q4_1"].pack(weight)


@given(digits=st.integers(1, 11), exponent=st.integers(-20, 10), seed=st.integers(0, 99))
def test_a_rounded_scale_keeps_its_digits_and_is_the_nearest(digits, exponent, seed):
    spec = half(4, False, digits=digits)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    scale = quantize_weight(weight, spec).scale.double()
    exact = quantize_weight(weight, replace(spec, scale_digits=None, scale_dtype=torch.float32)).scale.double()
    mantissa, _ = torch.frexp(scale)
    assert torch.equal(mantissa * 2**digits, (mantissa * 2**digits).round())
    half_step = torch.exp2((torch.frexp(exact).exponent - digits - 1).double())
    assert ((scale - exact).abs() <= half_step + 2**-25).all()  # the steps of subnormal numbers are 2^-24


@pytest.mark.parametrize(
    "spec",
    [
        half(8, False),
        half(4, True, PerGroup(16)),
        half(4, True, PerGroup(40)),
        half(4, True, PerBlock(64)),
        replace(half(4, True), scale_dtype=torch.bfloat16),
        replace(half(4, True), scale_dtype=torch.float32),
        QuantSpec.floating("e4m3", PerChannel(), torch.float16),
    ],
    ids=named,
)
def test_what_no_type_holds_has_none(spec):
    assert find_type(spec, 640) is None


def test_values_beyond_a_types_range_are_not_cut():
    weight = extreme_weight(half(5, True), 64)
    with pytest.raises(ExportError, match="don't fit into Q4_0"):
        BY_NAME["Q4_0"].pack(weight)
