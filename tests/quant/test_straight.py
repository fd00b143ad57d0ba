"""Rounding with gradients: values are those that are stored, slopes those of the same function without rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from llmc.quant import (
    ActSpec,
    InputQuantizer,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    clipped_weight,
    fake_quantize_inputs,
    quantize_weight,
)
from llmc.quant.affine import find_ranges, qparams
from llmc.quant.groups import to_groups

ROWS, COLUMNS = 5, 16
SPECS = {
    "asym group": QuantSpec(3, False, PerGroup(8)),
    "asym channel": QuantSpec(2, False, PerChannel()),
    "sym group": QuantSpec(4, True, PerGroup(4)),
    "sym gptq": QuantSpec(3, True, PerChannel(), sym_mode="gptq"),
    "sym full": QuantSpec(3, True, PerChannel(), sym_mode="full"),
    "tensor": QuantSpec(4, False, PerTensor()),
    "blocks": QuantSpec(4, False, PerBlock(4)),
}


def example(spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and ratios that cut off a part of it."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    shape = spec.scale_shape(ROWS, COLUMNS)
    lo, hi = (0.5 + 0.4 * torch.rand(shape, generator=generator) for _ in range(2))
    return weight, lo, hi


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_that_are_stored(name, dtype, scale_dtype):
    spec = QuantSpec(**{**vars(SPECS[name]), "scale_dtype": scale_dtype})
    weight, lo, hi = example(spec)
    ranges = [end.squeeze(-1) for end in find_ranges(to_groups(weight, spec), spec)]
    stored = quantize_weight(weight, spec, qparams(ranges[0] * lo, ranges[1] * hi, spec)).dequantize(dtype)
    assert torch.equal(clipped_weight(weight, spec, lo, hi, dtype), stored)
    leaves = [tensor.clone().requires_grad_() for tensor in (weight, lo, hi)]
    assert torch.equal(clipped_weight(leaves[0], spec, leaves[1], leaves[2], dtype).detach(), stored)


@pytest.mark.parametrize("name", SPECS)
def test_without_clipping_it_is_round_to_nearest(name):
    spec = SPECS[name]
    weight, lo, _ = example(spec)
    whole = torch.full_like(lo, torch.inf).sigmoid()
    assert torch.equal(
        clipped_weight(weight, spec, whole, whole, torch.float32), quantize_weight(weight, spec).dequantize()
    )


class Unrounded:
    """The grid in float64, rounding errors, zero points and what is cut off held as they are at one point."""

    def __init__(self, spec: QuantSpec, weight: Tensor, lo: Tensor, hi: Tensor) -> None:
        self.spec = spec
        groups, scale = self.grid(weight, lo, hi)
        half = 2 ** (spec.bits - 1)
        self.lowest, self.highest = -half, half - 1
        low = groups.amin(-1, keepdim=True).clamp(max=0) * lo[..., None]
        self.zero = (
            torch.zeros_like(scale) if spec.symmetric else (-half - (low / scale).round()).clamp(-half, half - 1)
        )
        self.error = (groups / scale).round() - groups / scale
        self.codes = (groups / scale).round() + self.zero
        self.inside = (self.codes >= self.lowest) & (self.codes <= self.highest)

    def grid(self, weight: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        groups = to_groups(weight, self.spec)
        low = groups.amin(-1, keepdim=True).clamp(max=0) * lo[..., None]
        high = groups.amax(-1, keepdim=True).clamp(min=0) * hi[..., None]
        levels, largest = 2**self.spec.bits - 1, 2 ** (self.spec.bits - 1) - 1
        if not self.spec.symmetric:
            return groups, (high - low) / levels
        reach = torch.maximum(-low, high)
        if self.spec.sym_mode == "full":
            return groups, torch.where(-low >= high, low, high) / -(largest + 1)
        return groups, reach / largest if self.spec.sym_mode == "restricted" else 2 * reach / levels

    def __call__(self, weight: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        groups, scale = self.grid(weight, lo, hi)
        free = groups / scale + self.error
        cut = self.codes.clamp(self.lowest, self.highest) - self.zero
        return torch.where(self.inside, free, cut) * scale


@pytest.mark.parametrize("name", [name for name in SPECS if name != "blocks"])
def test_gradients_are_finite_differences_of_the_unrounded_grid(name):
    spec = SPECS[name]
    exact = [tensor.double() for tensor in example(spec)]
    function = Unrounded(spec, *exact)
    assert not function.inside.all() and function.inside.any(), "some weights are cut off"
    weights = torch.randn(
        to_groups(exact[0], spec).shape, generator=torch.Generator().manual_seed(4), dtype=torch.double
    )
    leaves = [tensor.float().requires_grad_() for tensor in exact]
    rounded = to_groups(clipped_weight(*[leaves[0], spec, leaves[1], leaves[2]], torch.float32), spec)
    torch.testing.assert_close(rounded.detach().double(), function(*exact), rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad((rounded * weights.float()).sum(), leaves)
    step = 1e-6
    for position, gradient in enumerate(gradients):
        expected = torch.empty_like(exact[position])
        for place in itertools.product(*map(range, expected.shape)):
            ends = []
            for sign in (1, -1):
                moved = [tensor.clone() for tensor in exact]
                moved[position][place] += sign * step
                ends.append(float((function(*moved) * weights).sum()))
            expected[place] = (ends[0] - ends[1]) / (2 * step)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SPECS)
def test_equal_extremes_share_a_gradient_as_those_of_torch_do(name):
    spec = SPECS[name]
    weight, lo, hi = example(spec)
    weight = weight.round()  # most groups have several smallest and largest values
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    leaves = [tensor.clone().requires_grad_() for tensor in (weight, lo, hi)]
    found = torch.autograd.grad((clipped_weight(leaves[0], spec, *leaves[1:], torch.float32) * direction).sum(), leaves)
    # The same by what torch makes of the extremes, of the scale, and of the codes held fixed.
    groups = to_groups(leaves[0], spec)
    ends = groups.amin(-1), groups.amax(-1)
    assert (groups == ends[0][..., None]).sum(-1).max() > 1
    scale, zero = (
        part[..., None] for part in qparams(ends[0].clamp(max=0) * leaves[1], ends[1].clamp(min=0) * leaves[2], spec)
    )
    with torch.no_grad():
        unbounded = (groups / scale).round() + zero
        codes = unbounded.clamp(spec.qmin, spec.qmax)
        error = unbounded - zero - groups / scale
    rounded = torch.where(unbounded == codes, (groups / scale + error) * scale, (codes - zero.detach()) * scale)
    expected = torch.autograd.grad((rounded * to_groups(direction, spec)).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_pass_a_rounded_input_and_only_where_they_are_wanted():
    spec = ActSpec(QuantSpec(4, True, PerToken()))
    first, second = nn.Linear(COLUMNS, 3), nn.Linear(COLUMNS, 3)
    quantizer = InputQuantizer(spec, readers=2)
    for linear in (first, second):
        linear.register_forward_pre_hook(quantizer)
    quantizer.switch_on(None)
    inputs = torch.randn(7, COLUMNS, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = first(inputs) + 2 * second(inputs)
    rounded = fake_quantize_inputs(inputs.detach(), spec)
    assert not torch.equal(rounded, inputs)
    torch.testing.assert_close(output, rounded @ (first.weight + 2 * second.weight).T + first.bias + 2 * second.bias)
    direction = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((output * direction).sum(), [inputs])
    torch.testing.assert_close(gradient, (direction @ (first.weight + 2 * second.weight)).detach())
    quantizer.switch_off()
    torch.testing.assert_close(first(inputs), inputs @ first.weight.T + first.bias)
