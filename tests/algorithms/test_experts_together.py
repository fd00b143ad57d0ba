"""Experts that are solved together come out as each does alone: bit for bit, on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_gptq import ORDERS, brain_surgeon, linear, random_weight
from torch import Tensor

from llmc.algorithms import Algorithm, ClipRatios, Statistics, SubsetView, columnwise, sparsegpt
from llmc.algorithms.columnwise import Problem, chunks, solve, solve_all
from llmc.algorithms.gptq import GPTQ, GPTQOptions
from llmc.algorithms.sparsegpt import SparseGPT, SparseGPTOptions
from llmc.linalg import inverse_cholesky, inverse_choleskys
from llmc.quant import Mse, PerBlock, PerChannel, PerGroup, PerTensor, QuantSpec, QWeight, Sparsity, group_qparams

TOKENS = (64, 300, 9, 41, 0, 64)  # some Gram matrices have no full rank, one expert is reached by nobody
Views = Callable[..., list[SubsetView]]


class Matrix:
    """A Gram matrix as it is told to be."""

    def __init__(self, matrix: Tensor, tokens: int = 1) -> None:
        self.matrix, self.tokens = matrix, tokens


@pytest.fixture
def experts(make_view, tokens) -> Views:
    """Experts with two Linears each (13 rows: no kernel's favourite), of different inputs and numbers of tokens."""

    def make(spec: QuantSpec, *, columns: int = 32, counts: tuple[int, ...] = TOKENS) -> list[SubsetView]:
        found = []
        for seed, count in enumerate(counts):
            linears = {
                name: linear(random_weight(13, columns, 2 * seed + at)) for at, name in enumerate(("gate", "up"))
            }
            view = make_view(linears, [tokens(max(count, 1), columns, seed)], spec)
            if not count:
                view.stats = Statistics(gram=Matrix(torch.zeros(columns, columns), 0))
            found.append(view)
        return found

    return make


@pytest.fixture
def widths(monkeypatch) -> list[int]:
    """How many matrices each column loop has gone through."""
    seen: list[int] = []
    for module in (columnwise, sparsegpt):
        walk = module.replace_columns

        def spy(work, upper, rule, *, walk=walk, **options):
            seen.append(work.shape[1])
            walk(work, upper, rule, **options)

        monkeypatch.setattr(module, "replace_columns", spy)
    return seen


def same(left: QWeight, right: QWeight) -> bool:
    """Whether two weights are one, bit for bit."""
    fields = ("codes", "scale", "zero", "group_index")
    pairs = [(getattr(left, field), getattr(right, field)) for field in fields]
    return left.spec == right.spec and all(
        one is other if one is None or other is None else torch.equal(one.float(), other.float())
        for one, other in pairs
    )


def solve_both(method: Algorithm, together: list[SubsetView], alone: list[SubsetView]) -> None:
    """Results in the views of the one list from one call, in those of the other from a call for each."""
    method.solve(together)
    for view in alone:
        method.subset(view)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(4, True, PerChannel()),
        QuantSpec(3, False, PerGroup(8)),
        QuantSpec(3, False, PerGroup(8), ranges=Mse(), scale_dtype=torch.bfloat16),
        QuantSpec(2, True, PerGroup(16), "full"),
        QuantSpec.floating("e2m1", PerGroup(16), torch.float8_e8m0fnu),
    ],
)
@pytest.mark.parametrize("actorder", ORDERS)
@pytest.mark.parametrize("static", [True, False, None])
def test_gptq_solves_them_as_if_alone(experts, widths, spec, actorder, static):
    together, alone = experts(spec), experts(spec)
    solve_both(GPTQ(GPTQOptions(actorder=actorder, static_groups=static)), together, alone)
    assert widths == [5, 1, 1, 1, 1, 1]
    for one, other in zip(together, alone, strict=True):
        assert all(same(one.quantized[name], other.quantized[name]) for name in ("gate", "up"))
        assert one.notes == other.notes
    assert "no calibration token" in together[4].notes["up"].fallback
    assert not same(together[0].quantized["up"], together[5].quantized["up"])


@pytest.mark.parametrize("granularity", [PerTensor(), PerBlock(8)])
def test_grids_that_rows_share_are_solved_linear_by_linear(experts, widths, granularity):
    spec = QuantSpec(4, True, granularity)
    together, alone = experts(spec), experts(spec)
    solve_both(GPTQ(GPTQOptions()), together, alone)
    assert widths[:2] == [5, 5], "gate, up"
    for one, other in zip(together, alone, strict=True):
        assert all(same(one.quantized[name], other.quantized[name]) for name in ("gate", "up"))


@pytest.mark.parametrize("actorder", ORDERS)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_their_codes_are_the_brain_surgeons(tokens, actorder, static, symmetric):
    spec = QuantSpec(3, symmetric, PerGroup(4))
    weights, inputs = [random_weight(16, 16, seed) for seed in range(4)], [tokens(64, 16, seed) for seed in range(4)]
    grams = [one.T @ one for one in inputs]
    problems = [
        Problem(weight, gram, group_qparams(weight, spec) if static else None)
        for weight, gram in zip(weights, grams, strict=True)
    ]
    solutions = solve_all(problems, spec, GPTQOptions(actorder=actorder))
    assert not problems, "whoever stacked the weights is rid of them"
    for weight, gram, found in zip(weights, grams, solutions, strict=True):
        codes, dense = brain_surgeon(weight, gram, spec, actorder=actorder, static=static)
        assert torch.equal(found.codes.double(), codes)
        made = QWeight.from_float(found.codes, found.scale, found.zero, spec, found.group_index)
        torch.testing.assert_close(made.dequantize().double(), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("actorder", ORDERS)
def test_who_is_damped_more_or_not_solved_at_all_disturbs_nobody(experts, widths, actorder):
    spec = QuantSpec(4, False, PerGroup(8))
    together, alone = experts(spec, counts=(64,) * 5), experts(spec, counts=(64,) * 5)
    tilted = torch.diag(torch.tensor([-0.05] + [(32 + 0.05) / 31] * 31))  # mean diagonal 1: damped by 0.1
    for views in (together, alone):
        for at, matrix in ((1, tilted), (2, -torch.eye(32)), (4, torch.full((32, 32), torch.nan))):
            views[at].stats = Statistics(gram=Matrix(matrix))
    solve_both(GPTQ(GPTQOptions(actorder=actorder)), together, alone)
    assert widths[0] == 3
    assert [view.notes["up"].damp for view in together] == pytest.approx([0.01, 0.1, None, 0.01, None])
    assert [view.notes["up"].fallback is None for view in together] == [True, True, False, True, False]
    for one, other in zip(together, alone, strict=True):
        assert all(same(one.quantized[name], other.quantized[name]) for name in ("gate", "up"))
        assert torch.equal(torch.tensor(one.notes["up"].error), torch.tensor(other.notes["up"].error))


@pytest.mark.parametrize("actorder", ORDERS)
def test_clipped_and_pruned_experts_are_solved_with_their_likes(experts, widths, actorder):
    """Two are clipped, whose ranges are fixed; two of the others pruned."""
    spec = QuantSpec(3, False, PerGroup(8))
    together, alone = experts(spec, counts=(64,) * 6), experts(spec, counts=(64,) * 6)
    for views in (together, alone):
        generator = torch.Generator().manual_seed(0)
        for view in views[:2]:
            lo, hi = torch.rand(2, 13, 4, generator=generator) / 2 + 0.5
            view.clips["up"] = ClipRatios(lo, hi)
        for view in views[2:4]:
            view.pruned |= {name: torch.rand(13, 32, generator=generator) < 0.5 for name in view.linears}
            for name, mask in view.pruned.items():
                view.linears[name].weight.data.masked_fill_(mask, 0)
    solve_both(GPTQ(GPTQOptions(actorder=actorder, static_groups=False)), together, alone)
    assert widths[:3] == [2, 2, 2]
    for one, other in zip(together, alone, strict=True):
        for name, quantized in one.quantized.items():
            assert same(quantized, other.quantized[name])
            if name in one.pruned:
                assert not quantized.dequantize()[one.pruned[name]].any()


def test_nvfp4_experts_are_solved_together_where_their_ranges_are_known(experts, widths):
    """Each has a global scale of its own, which only ranges found on the way must know."""
    spec = QuantSpec.floating("e2m1", PerGroup(16), torch.float8_e4m3fn)
    found = []
    for _ in range(2):
        views = experts(spec, counts=(64,) * 3)
        for scale, view in enumerate(views):
            bound = QuantSpec(
                4, True, PerGroup(16), scale_dtype=spec.scale_dtype, grid="e2m1", global_scale=300.0 + scale
            )
            view.specs = dict.fromkeys(view.linears, bound)
        found.append(views)
    together, alone = found
    solve_both(GPTQ(GPTQOptions(actorder=True)), together, alone)
    assert widths[0] == 3
    for one, other in zip(together, alone, strict=True):
        assert all(same(one.quantized[name], other.quantized[name]) for name in ("gate", "up"))
    widths.clear()
    GPTQ(GPTQOptions(actorder=False)).solve(together)
    assert widths == [1, 1, 1]


def test_different_shapes_and_grids_are_not_mixed(make_view, tokens, widths):
    inputs = [tokens(64, 32)]
    four, three = QuantSpec(4, True, PerChannel()), QuantSpec(3, True, PerChannel())
    cases = [(8, four), (8, four), (12, four), (8, three)]
    views = [
        make_view({"down": linear(random_weight(rows, 32, at))}, inputs, spec) for at, (rows, spec) in enumerate(cases)
    ]
    GPTQ(GPTQOptions()).solve(views)
    assert widths == [2, 1, 1]
    assert [tuple(view.quantized["down"].codes.shape) for view in views] == [(rows, 32) for rows, _ in cases]
    assert [view.quantized["down"].spec for view in views] == [spec for _, spec in cases]


@pytest.mark.parametrize("method", [GPTQ(GPTQOptions()), SparseGPT(SparseGPTOptions())])
def test_how_many_go_together_does_not_matter(experts, widths, monkeypatch, method):
    results = []
    for elements in (1, 4000, 10**9):
        monkeypatch.setattr(columnwise, "_CPU", elements)
        views = experts(QuantSpec(4, False, PerGroup(8)), counts=(64,) * 5)
        for view in views:
            view.sparsity = dict.fromkeys(view.linears, Sparsity(0.5))
        method.solve(views)
        results.append([[*view.quantized.values(), *view.weights.values()] for view in views])
    assert {1, 2, 5} == set(widths)
    for first, *others in zip(*results, strict=True):
        for other in others:
            for one, two in zip(first, other, strict=True):
                assert same(one, two) if isinstance(one, QWeight) else torch.equal(one, two)


def test_chunks_are_in_order_and_as_large_as_allowed(monkeypatch):
    monkeypatch.setattr(columnwise, "_CPU", 100)
    assert [list(one) for one in chunks(range(7), 33, torch.device("cpu"))] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [list(one) for one in chunks(range(2), 101, torch.device("cpu"))] == [[0], [1]]


@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity(0.3), Sparsity(0.5, (2, 4))])
@pytest.mark.parametrize("blocksize", [128, 12])
def test_sparsegpt_prunes_them_as_if_alone(experts, widths, sparsity, blocksize):
    together, alone = (experts(QuantSpec(4, True, PerChannel())) for _ in range(2))
    for view in together + alone:
        view.sparsity = dict.fromkeys(view.linears, sparsity)
    for views in (together, alone):
        views[3].stats = Statistics(gram=Matrix(-torch.eye(32)))
    solve_both(SparseGPT(SparseGPTOptions(blocksize=blocksize)), together, alone)
    assert widths[:2] == [4, 4], "gate, up"
    for one, other in zip(together, alone, strict=True):
        assert one.weights.keys() == {"gate", "up"}
        for name, weight in one.weights.items():
            assert torch.equal(weight, other.weights[name])
            assert torch.equal(one.pruned[name], other.pruned[name])
        assert one.notes == other.notes
    assert ["pruned by magnitude" in (view.notes["up"].fallback or "") for view in together] == [
        at in (3, 4) for at in range(6)
    ]


def test_factors_of_several_are_those_of_each():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 80, 24, generator=generator)
    hessians = inputs.mT @ inputs
    hessians[1] = torch.diag(torch.tensor([-0.5] + [24.5 / 23] * 23))
    hessians[3] = -torch.eye(24)
    hessians[4, 5, 5] = torch.inf
    found = inverse_choleskys(hessians, 0.01)
    alone = [inverse_cholesky(one, 0.01) for one in hessians]
    assert [None if one is None else one.damp for one in alone] == list(found.damps)
    assert found.found == [0, 1, 2, 5]
    assert found.damps[1] > found.damps[0] == 0.01
    for upper, index in zip(found.upper, found.found, strict=True):
        assert torch.equal(upper, alone[index].upper)


def test_real_shapes_are_bit_equal_too(tokens):
    """Wide enough for every kernel's main loop, in several blocks and tiles."""
    spec, options = QuantSpec(4, False, PerGroup(64)), GPTQOptions()
    weights = [random_weight(257, 192, seed) for seed in range(3)]
    grams = [(inputs := tokens(count, 192, count)).T @ inputs for count in (100, 400, 900)]
    ranges = [group_qparams(weight, spec) for weight in weights]
    found = solve_all([Problem(*one) for one in zip(weights, grams, ranges, strict=True)], spec, options)
    for weight, gram, fixed, one in zip(weights, grams, ranges, found, strict=True):
        assert torch.equal(one.codes, solve(weight, gram, spec, options, fixed).codes)
