"""Pruners against their definitions: naive loops, and optimal brain surgery with an explicit inverse in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmc.algorithms import Algorithm, Statistics, SubsetView
from llmc.algorithms.gptq import GPTQ, GPTQOptions
from llmc.algorithms.gptq import solve as round_columns
from llmc.algorithms.magnitude import Magnitude, MagnitudeOptions
from llmc.algorithms.rtn import RTN, RTNOptions
from llmc.algorithms.sparsegpt import SparseGPT, SparseGPTOptions, solve
from llmc.algorithms.wanda import Wanda, WandaOptions
from llmc.linalg import input_factor
from llmc.quant import PerChannel, PerGroup, PerTensor, QuantSpec, Sparsity, group_qparams, lowest, prune_mask

PRUNERS = [Magnitude(MagnitudeOptions()), Wanda(WandaOptions()), SparseGPT(SparseGPTOptions())]
HALF, TWO_OF_FOUR = Sparsity(0.5), Sparsity(0.5, (2, 4))
SPECS = [
    QuantSpec(4, True, PerChannel()),
    QuantSpec(3, False, PerGroup(8)),
    QuantSpec(2, True, PerGroup(8), "full"),
    QuantSpec(8, False, PerTensor()),
]


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed))


def linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data = weight.clone()
    return made


@pytest.fixture
def view_of(make_view):
    """A view of Linears to be pruned; with a grid, they are to be quantized behind it."""

    def make(weights: dict[str, Tensor], inputs: list[Tensor], sparsity: Sparsity, spec: QuantSpec | None = None):
        linears = {name: linear(weight) for name, weight in weights.items()}
        view: SubsetView = make_view(linears, inputs, spec or {})
        view.sparsity = dict.fromkeys(linears, sparsity)
        return view

    return make


def go_on(view: SubsetView) -> SubsetView:
    """The view of the next step: the pruned weights are live."""
    for name, weight in view.weights.items():
        view.linears[name].weight.data = weight
    return view


def loss(weight: Tensor, changed: Tensor, gram: Tensor) -> float:
    delta = (changed - weight).double()
    return ((delta @ gram.double()) * delta).sum().item()


# --- the scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_wanda_is_the_papers_loop_over_all_samples(view_of, tokens, ratio):
    weight, samples = random_weight(16, 40), [tokens(30, 40, seed) * (1 + 5 * seed) for seed in range(3)]
    view = view_of({"fc": weight}, samples, Sparsity(ratio))
    Wanda(WandaOptions()).subset(view)
    values, inputs = weight.numpy().astype(np.float64), torch.cat(samples).numpy().astype(np.float64)
    expected = values.copy()
    for row in range(16):
        score = [abs(values[row, j]) * np.sqrt(sum(x * x for x in inputs[:, j])) for j in range(40)]
        for j in sorted(range(40), key=lambda j: score[j])[: int(40 * ratio)]:
            expected[row, j] = 0
    assert np.array_equal(view.weights["fc"].numpy(), expected.astype(np.float32))
    assert torch.equal(view.pruned["fc"], view.weights["fc"] == 0)
    one_sample = view_of({"fc": weight}, samples[:1], Sparsity(ratio))
    Wanda(WandaOptions()).subset(one_sample)
    assert not torch.equal(one_sample.pruned["fc"], view.pruned["fc"])


def test_magnitude_compares_all_weights_of_each_linear(view_of):
    weights = {"q": random_weight(16, 20) * torch.linspace(0.1, 1, 16)[:, None], "k": random_weight(8, 20, 1)}
    view = view_of(weights, [torch.eye(20)], Sparsity(0.3))
    Magnitude(MagnitudeOptions()).subset(view)
    assert view.weights.keys() == weights.keys()
    for name, weight in weights.items():
        pruned = view.weights[name]
        assert (pruned == 0).sum() == weight.numel() * 3 // 10
        assert weight[pruned == 0].abs().max() < weight[pruned != 0].abs().min()
        assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


def brain_surgeon(weight: Tensor, gram: Tensor, sparsity: Sparsity, blocksize: int, damp: float = 0.01):
    """Column by column with an explicit inverse, from which a column leaves when it has been visited. Masks are chosen
    at the start of a block (a run) by the loss ``w² / [H⁻¹]_jj`` that a removal has *when column j is reached*."""
    work, hessian = weight.double().clone(), gram.double()
    rows, columns = work.shape
    inverse = torch.linalg.inv(hessian + damp * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64))
    inverses = [inverse.clone()]
    for column in range(columns):
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverses.append(inverse.clone())
    at_its_turn = torch.stack([inverses[column][column, column] for column in range(columns)])
    mask, dense = torch.zeros(rows, columns, dtype=torch.bool), torch.zeros_like(work)
    length = blocksize if sparsity.pattern is None else sparsity.pattern[1]
    for column in range(columns):
        if column % length == 0:
            score = work[:, column : column + length] ** 2 / at_its_turn[column : column + length]
            if sparsity.pattern is None:
                order = score.flatten().argsort()[: int(score.numel() * sparsity.ratio)]
                chosen = torch.zeros(score.numel(), dtype=torch.bool)
                chosen[order] = True
                mask[:, column : column + length] = chosen.reshape(score.shape)
            else:
                for row in range(rows):
                    mask[row, column + score[row].argsort()[: sparsity.pattern[0]]] = True
        final = work[:, column].masked_fill(mask[:, column], 0)
        error = (work[:, column] - final) / inverses[column][column, column]
        work -= torch.outer(error, inverses[column][column])
        dense[:, column] = final
    return dense, mask


@pytest.mark.parametrize(
    ("columns", "blocksize", "sparsity"),
    [
        (16, 16, HALF),
        (16, 4, Sparsity(0.7)),
        (16, 128, TWO_OF_FOUR),
        (16, 16, Sparsity(0.25, (1, 4))),
        (96, 32, Sparsity(0.3)),
        (96, 48, TWO_OF_FOUR),  # blocks and tiles end in between
        (96, 10, Sparsity(0.5, (4, 8))),
        (96, 128, Sparsity(0.5, (24, 48))),  # runs longer than a tile
        (90, 128, Sparsity(0.5, (3, 6))),  # runs that don't divide a tile's usual length
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_equals_the_brain_surgeon(tokens, columns, blocksize, sparsity, seed):
    weight, inputs = random_weight(16, columns, seed), tokens(4 * columns, columns, seed)
    gram = inputs.T @ inputs
    found, mask = solve(weight, input_factor(gram, 0.01), sparsity, blocksize)
    expected, expected_mask = brain_surgeon(weight, gram, sparsity, blocksize)
    assert torch.equal(mask, expected_mask)
    assert torch.equal(mask, found == 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR, Sparsity(0.6)])
def test_with_uncorrelated_inputs_sparsegpt_is_magnitude(view_of, sparsity):
    weight = random_weight(12, 32)
    views = [view_of({"fc": weight}, [torch.eye(32)], sparsity) for _ in range(2)]
    SparseGPT(SparseGPTOptions()).subset(views[0])
    Magnitude(MagnitudeOptions()).subset(views[1])
    assert torch.equal(views[0].weights["fc"], views[1].weights["fc"])


@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR])
@pytest.mark.parametrize("seed", range(4))
def test_outputs_are_closest_with_sparsegpt_then_wanda_then_magnitude(view_of, tokens, sparsity, seed):
    weight, inputs = random_weight(32, 64, seed), tokens(256, 64, seed)
    losses = []
    for pruner in PRUNERS:
        view = view_of({"fc": weight}, [inputs], sparsity)
        pruner.subset(view)
        losses.append(loss(weight, view.weights["fc"], inputs.T @ inputs))
    magnitude, wanda, sparsegpt = losses
    assert sparsegpt < wanda < magnitude


def test_channels_that_never_fire_are_pruned_first_and_have_no_say(view_of, tokens):
    weight, inputs = random_weight(8, 34), tokens(200, 34)
    inputs[:, [3, 17]] = 0
    weight[:, [3, 17]] = 50.0
    for pruner in PRUNERS[1:]:
        view = view_of({"fc": weight}, [inputs], HALF)
        pruner.subset(view)
        assert view.pruned["fc"][:, [3, 17]].all()
        assert view.weights["fc"].abs().max() < 10


@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR])
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: pruner.name)
def test_linears_that_share_an_input_are_pruned_as_if_alone_and_the_ignored_not(view_of, tokens, pruner, sparsity):
    weights = {name: random_weight(rows, 32, rows) for name, rows in (("q", 16), ("k", 8), ("v", 12))}
    inputs = [tokens(128, 32)]
    together = view_of(weights, inputs, sparsity)
    together.sparsity = {"q": sparsity, "v": sparsity}
    pruner.subset(together)
    assert together.weights.keys() == together.pruned.keys() == {"q", "v"}
    for name in ("q", "v"):
        alone = view_of({name: weights[name]}, inputs, sparsity)
        pruner.subset(alone)
        assert torch.equal(together.weights[name], alone.weights[name])
        assert together.notes[name].sparsity == 0.5
        assert 0 < together.notes[name].error < 1
        assert torch.equal(together.linears[name].weight.data, weights[name])  # changes only by what it delivers


@pytest.mark.parametrize("gram", [torch.full((16, 16), float("nan")), -torch.eye(16)])
def test_a_hopeless_hessian_falls_back_to_magnitude_and_says_so(view_of, gram):
    class Hopeless:
        matrix, tokens = gram, 1

    weight = random_weight(8, 16)
    view = view_of({"fc": weight}, [torch.eye(16)], TWO_OF_FOUR)
    view.stats = Statistics(gram=Hopeless())
    SparseGPT(SparseGPTOptions()).subset(view)
    assert torch.equal(view.pruned["fc"], prune_mask(weight.abs(), TWO_OF_FOUR, compare="all"))
    assert "could not be factored" in view.notes["fc"].fallback


def test_the_note_of_sparsegpt_has_the_error_of_the_outputs(view_of, tokens):
    weight, inputs = random_weight(8, 16), tokens(64, 16)
    view = view_of({"fc": weight}, [inputs], HALF)
    SparseGPT(SparseGPTOptions()).subset(view)
    outputs = inputs @ weight.T
    error = (inputs @ view.weights["fc"].T - outputs).square().sum() / outputs.square().sum()
    note = view.notes["fc"]
    assert note.error == pytest.approx(error.item(), rel=1e-4)
    assert (note.damp, note.sparsity) == (0.01, 0.5)


# --- quantization behind it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantizer",
    [
        RTN(RTNOptions()),
        GPTQ(GPTQOptions()),
        GPTQ(GPTQOptions(actorder="group_aware", static_groups=False)),
        GPTQ(GPTQOptions(actorder=True, static_groups=False)),
        GPTQ(GPTQOptions(actorder=False, static_groups=True, blocksize=5)),
    ],
    ids=["RTN", "GPTQ", "group_aware", "scattered", "static"],
)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.describe())
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: pruner.name)
@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR], ids=lambda sparsity: sparsity.describe())
def test_what_was_pruned_stays_zero(view_of, tokens, pruner: Algorithm, quantizer: Algorithm, spec, sparsity):
    weights = {"q": random_weight(16, 32), "k": random_weight(8, 32, 1)}
    view = view_of(weights, [tokens(128, 32)], sparsity, spec)
    pruner.subset(view)
    quantizer.subset(go_on(view))
    for name in weights:
        dense = view.quantized[name].dequantize()
        assert not dense[view.pruned[name]].any()
        assert view.pruned[name].float().mean() == 0.5
        assert dense[~view.pruned[name]].any()


def surgeon_on_a_grid(weight: Tensor, gram: Tensor, pruned: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of a symmetric grid per row, in float64; pruned weights are 0."""
    work = weight.double().clone()
    columns = weight.shape[1]
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(columns, dtype=torch.float64)
    inverse, codes = torch.linalg.inv(damped), torch.zeros_like(work)
    for column in range(columns):
        code = (work[:, column] / scale).round().clamp(spec.qmin, spec.qmax)
        codes[:, column] = torch.where(pruned[:, column], 0.0, code)
        error = (work[:, column] - codes[:, column] * scale) / inverse[column, column]
        work -= torch.outer(error, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0
    return codes


@pytest.mark.parametrize("seed", range(3))
def test_gptq_hands_on_what_reaches_a_pruned_weight(tokens, seed):
    weight, inputs = random_weight(16, 16, seed), tokens(64, 16, seed)
    pruned = lowest(torch.rand(16, 16, generator=torch.Generator().manual_seed(seed)), 8)
    weight, gram, spec = weight.masked_fill(pruned, 0), inputs.T @ inputs, QuantSpec(3, True, PerChannel())
    fixed = group_qparams(weight, spec)
    solution = round_columns(weight, gram, spec, GPTQOptions(actorder=False), fixed, pruned)
    expected = surgeon_on_a_grid(weight, gram, pruned, fixed[0].squeeze(-1).double(), spec)
    assert torch.equal(solution.codes.double(), expected)
    free = round_columns(weight, gram, spec, GPTQOptions(actorder=False), fixed)
    assert (free.codes[pruned] != 0).any()  # left to itself it revives some


def test_a_range_found_on_the_way_does_not_see_pruned_weights(tokens):
    """In the second group all weights are pruned: whatever the updates bring there, its range has no extent."""
    weight, inputs = random_weight(8, 16), tokens(64, 16)
    pruned = torch.zeros(8, 16, dtype=torch.bool)
    pruned[:, 8:] = True
    solution = round_columns(
        weight.masked_fill(pruned, 0), inputs.T @ inputs, QuantSpec(2, True, PerGroup(8)),
        GPTQOptions(actorder=False, static_groups=False), None, pruned,
    )  # fmt: skip
    assert (solution.scale[:, 1] == 1).all()
    assert (solution.scale[:, 0] != 1).all()
