"""GPTQ against optimal brain quantization as the paper has it: float64, an explicit inverse, one column at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmc.algorithms import ClipRatios, Statistics
from llmc.algorithms.gptq import GPTQ, GPTQOptions, solve
from llmc.quant import Mse, PerChannel, PerGroup, PerTensor, QuantSpec, QWeight, group_qparams, quantize_weight

ORDERS = [False, True, "group_aware"]


def visiting_order(diagonal: Tensor, actorder: bool | str, size: int) -> list[int]:
    importance = diagonal.tolist()
    falling = sorted(range(len(importance)), key=lambda column: -importance[column])
    if actorder is True:
        return falling
    groups = [[c for c in falling if c // size == group] for group in range(len(importance) // size)]
    if actorder is False:
        return list(range(len(importance)))
    return [c for group in sorted(groups, key=lambda group: -sum(importance[c] for c in group)) for c in group]


def grid(values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of rows ``[out, n]`` by min and max."""
    lo, hi = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
    half = 2 ** (spec.bits - 1)
    if spec.symmetric:
        return torch.maximum(-lo, hi) / (half - 1), torch.zeros_like(lo)
    scale = (hi - lo) / (2 * half - 1)
    return scale, -half - (lo / scale).round()


def brain_surgeon(
    weight: Tensor, gram: Tensor, spec: QuantSpec, *, actorder: bool | str, static: bool, damp: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Codes and dense weight. Every rounding error is spread over all columns not yet rounded, then its column and row
    leave the inverse Hessian. A dynamic group's range is that of its columns when the first of them is reached."""
    work, hessian = weight.double().clone(), gram.double().clone()
    columns, half = weight.shape[1], 2 ** (spec.bits - 1)
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else columns
    inverse = torch.linalg.inv(hessian + damp * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64))
    order = visiting_order(hessian.diagonal(), actorder, size)
    codes, dense = torch.zeros_like(work), torch.zeros_like(work)
    for position, column in enumerate(order):
        if static:
            start = column // size * size
            scale, zero = grid(weight[:, start : start + size].double(), spec)
        elif position % size == 0:
            scale, zero = grid(work[:, order[position : position + size]], spec)
        codes[:, column] = ((work[:, column] / scale).round() + zero).clamp(-half, half - 1)
        dense[:, column] = (codes[:, column] - zero) * scale
        error = (work[:, column] - dense[:, column]) / inverse[column, column]
        work -= torch.outer(error, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # gone: never read again
    return codes, dense


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed))


def linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data = weight.clone()
    return made


def loss(weight: Tensor, changed: Tensor, gram: Tensor) -> float:
    delta = (changed - weight).double()
    return ((delta @ gram.double()) * delta).sum().item()


def solved(weight: Tensor, gram: Tensor, spec: QuantSpec, options: GPTQOptions, *, static: bool) -> QWeight:
    solution = solve(weight, gram, spec, options, group_qparams(weight, spec) if static else None)
    return QWeight.from_float(solution.codes, solution.scale, solution.zero, spec, solution.group_index)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(4, True, PerChannel()),
        QuantSpec(3, False, PerGroup(8)),
        QuantSpec(2, True, PerGroup(8), "full"),
        QuantSpec(4, False, PerTensor()),
        QuantSpec(3, True, PerGroup(8), "gptq", Mse(), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("actorder", ORDERS)
@pytest.mark.parametrize("static", [True, False])
def test_uncorrelated_inputs_leave_round_to_nearest(make_view, spec, actorder, static):
    weight = random_weight(12, 32)
    view = make_view({"fc": linear(weight)}, [torch.eye(32)], spec)
    GPTQ(GPTQOptions(actorder=actorder, static_groups=static)).subset(view)
    expected, found = quantize_weight(weight, spec), view.quantized["fc"]
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantize(), expected.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(4)])
@pytest.mark.parametrize("actorder", ORDERS)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_codes_equal_the_brain_surgeons(tokens, symmetric, granularity, actorder, static, seed):
    weight, inputs = random_weight(16, 16, seed), tokens(64, 16, seed)
    spec = QuantSpec(3, symmetric, granularity)
    per_channel = granularity == PerChannel()  # one group: its range can't wait for updates
    codes, dense = brain_surgeon(weight, inputs.T @ inputs, spec, actorder=actorder, static=static or per_channel)
    found = solved(weight, inputs.T @ inputs, spec, GPTQOptions(actorder=actorder), static=static)
    assert torch.equal(found.codes.double(), codes)
    torch.testing.assert_close(found.dequantize().double(), dense, rtol=1e-4, atol=1e-5)


def test_a_range_sees_the_updates_of_its_own_column_block(tokens):
    """Groups of 4 within blocks of 128 columns: taking the ranges from before the block would give other scales."""
    weight, inputs = random_weight(16, 32), tokens(128, 32)
    spec, options = QuantSpec(2, False, PerGroup(4)), GPTQOptions(actorder=False, blocksize=128)
    found = solved(weight, inputs.T @ inputs, spec, options, static=False)
    codes, dense = brain_surgeon(weight, inputs.T @ inputs, spec, actorder=False, static=False)
    assert torch.equal(found.codes.double(), codes)
    torch.testing.assert_close(found.dequantize().double(), dense, rtol=1e-4, atol=1e-5)
    stale = group_qparams(weight, spec)[0]
    assert torch.equal(found.scale[:, 0], stale[:, 0])
    assert not torch.isclose(found.scale[:, 1:], stale[:, 1:], rtol=1e-3).any(0).all()


@pytest.mark.parametrize("actorder", ORDERS)
@pytest.mark.parametrize("spec", [QuantSpec(4, True, PerChannel()), QuantSpec(2, False, PerGroup(16))])
@pytest.mark.parametrize("seed", range(4))
def test_outputs_are_closer_than_with_round_to_nearest(tokens, actorder, spec, seed):
    weight, inputs = random_weight(32, 64, seed), tokens(256, 64, seed)
    gram = inputs.T @ inputs
    found = solved(weight, gram, spec, GPTQOptions(actorder=actorder), static=True)
    assert loss(weight, found.dequantize(), gram) < loss(weight, quantize_weight(weight, spec).dequantize(), gram)


@pytest.mark.parametrize("actorder", ORDERS)
@pytest.mark.parametrize("static", [True, False])
def test_the_block_size_does_not_matter(tokens, actorder, static):
    weight, inputs = random_weight(24, 96), tokens(300, 96)
    spec = QuantSpec(4, False, PerGroup(32))

    def codes(blocksize: int) -> Tensor:
        options = GPTQOptions(actorder=actorder, blocksize=blocksize)
        return solved(weight, inputs.T @ inputs, spec, options, static=static).codes

    for blocksize in (1, 7, 32):
        assert torch.equal(codes(blocksize), codes(128))


@pytest.mark.parametrize("actorder", ORDERS)
def test_only_act_order_over_dynamic_groups_needs_an_index(tokens, actorder):
    weight, inputs = random_weight(8, 32), tokens(100, 32)
    gram, spec, options = inputs.T @ inputs, QuantSpec(4, True, PerGroup(8)), GPTQOptions(actorder=actorder)
    assert solved(weight, gram, spec, options, static=True).group_index is None
    index = solved(weight, gram, spec, options, static=False).group_index
    if actorder is True:
        order = visiting_order(gram.diagonal(), True, 8)
        assert [index[column].item() for column in order] == [position // 8 for position in range(32)]
    else:
        assert index is None


@pytest.mark.parametrize("actorder", ORDERS)
def test_channels_that_never_fire_have_no_say(make_view, tokens, actorder):
    """Their weights become 0, and neither the codes nor the ranges of the others know that they were there."""
    dead = [3, 17]
    alive = [column for column in range(34) if column not in dead]
    weight, inputs = random_weight(8, 34), tokens(100, 34)
    inputs[:, dead] = 0
    weight[:, dead] = 50.0
    options, spec = GPTQOptions(actorder=actorder, percdamp=0.0), QuantSpec(4, True, PerChannel())
    whole = make_view({"fc": linear(weight)}, [inputs], spec)
    without = make_view({"fc": linear(weight[:, alive])}, [inputs[:, alive]], spec)
    for view in (whole, without):
        GPTQ(options).subset(view)
    dense = whole.quantized["fc"].dequantize()
    assert (dense[:, dead] == 0).all()
    assert torch.equal(dense[:, alive], without.quantized["fc"].dequantize())


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(8), PerTensor()])
def test_linears_that_share_an_input_are_solved_as_if_alone(make_view, tokens, granularity):
    linears = {name: linear(random_weight(rows, 32, rows)) for name, rows in (("q", 16), ("k", 8), ("v", 12))}
    spec, inputs = QuantSpec(3, False, granularity), [tokens(128, 32)]
    together = make_view(linears, inputs, spec)
    GPTQ(GPTQOptions(actorder="group_aware")).subset(together)
    for name, module in linears.items():
        alone = make_view({name: module}, inputs, spec)
        GPTQ(GPTQOptions(actorder="group_aware")).subset(alone)
        assert torch.equal(together.quantized[name].codes, alone.quantized[name].codes)
        torch.testing.assert_close(together.quantized[name].scale, alone.quantized[name].scale)


def test_each_linear_gets_its_own_grid_and_the_ignored_none(make_view, tokens):
    linears = {name: linear(random_weight(8, 32, seed)) for seed, name in enumerate(("q", "k", "v"))}
    specs = {"q": QuantSpec(3, True, PerChannel()), "v": QuantSpec(8, False, PerGroup(8))}
    view = make_view(linears, [tokens(128, 32)], specs)
    GPTQ(GPTQOptions()).subset(view)
    assert {name: weight.spec for name, weight in view.quantized.items()} == specs


@pytest.mark.parametrize(
    "gram", [torch.full((16, 16), float("nan")), torch.full((16, 16), float("inf")), -torch.eye(16)]
)
def test_a_hopeless_hessian_falls_back_to_rounding_and_says_so(make_view, gram):
    class Hopeless:
        matrix, tokens = gram, 1

    weight, spec = random_weight(8, 16), QuantSpec(4, True, PerGroup(8))
    view = make_view({"fc": linear(weight)}, [torch.eye(16)], spec)
    view.stats = Statistics(gram=Hopeless())
    GPTQ(GPTQOptions()).subset(view)
    assert torch.equal(view.quantized["fc"].codes, quantize_weight(weight, spec).codes)
    assert "could not be factored" in view.notes["fc"].fallback


def test_the_note_has_the_error_of_the_outputs_and_the_damping(make_view, tokens):
    weight, inputs = random_weight(8, 16), tokens(64, 16)
    view = make_view({"fc": linear(weight)}, [inputs], QuantSpec(3, True, PerChannel()))
    GPTQ(GPTQOptions()).subset(view)
    outputs = inputs @ weight.T
    error = (inputs @ view.quantized["fc"].dequantize().T - outputs).square().sum() / outputs.square().sum()
    note = view.notes["fc"]
    assert note.error == pytest.approx(error.item(), rel=1e-4)
    assert (note.damp, note.fallback) == (0.01, None)


@pytest.mark.parametrize("static", [True, False, None])
def test_clips_of_an_earlier_step_set_the_ranges(make_view, nearest, static):
    weight, spec = random_weight(8, 16), QuantSpec(4, False, PerGroup(8))
    lo, hi = torch.rand(2, 8, 2, generator=torch.Generator().manual_seed(0)) / 2 + 0.5
    view = make_view({"fc": linear(weight)}, [torch.eye(16)], spec)
    view.clips["fc"] = ClipRatios(lo, hi)
    GPTQ(GPTQOptions(static_groups=static, actorder=False)).subset(view)
    torch.testing.assert_close(view.quantized["fc"].dequantize(), nearest(weight, spec, lo, hi))
