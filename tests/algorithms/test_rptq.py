"""RPTQ on one subset: its clusters by definition, its weights against optimal brain quantization in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from llmc.algorithms import AttentionRanges
from llmc.algorithms.rptq import RPTQ, RPTQOptions
from llmc.models import Heads, Subset
from llmc.quant import ActSpec, PerCluster, QuantSpec

SPEC = QuantSpec(4, False, PerCluster())
ACT = ActSpec(QuantSpec(4, False, PerCluster()))
QKV = Subset(("q", "k", "v"), "norm", "", writes="heads")
OUT = Subset(("o",), "v", "", reads="heads", writes="residual")
UP = Subset(("gate", "up"), "norm", "", writes="ffn")
DOWN = Subset(("down",), "up", "", reads="ffn", writes="residual")
HEADS = Heads(4, 2, 6)


def linear(rows: int, columns: int, seed: int = 0) -> nn.Linear:
    made = nn.Linear(columns, rows, bias=False)
    made.weight.data = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return made


def sequences(channels: Tensor, count: int = 3, seed: int = 0) -> Tensor:
    """``[count, 40, channels]``, of the given sizes."""
    return (2 * torch.rand(count, 40, len(channels), generator=torch.Generator().manual_seed(seed)) - 1) * channels


@pytest.fixture
def solved(make_view):
    """A view that RPTQ has seen."""

    def make(subset: Subset, inputs: Tensor, act=ACT, attention=None, spec=SPEC, **options):
        linears = {name: linear(5 + i, inputs.shape[-1], seed=i) for i, name in enumerate(subset.linears)}
        view = make_view(linears, [inputs[:2], inputs[2:]], spec, subset=subset, heads=HEADS)
        view.clustered, view.attention = act, attention
        RPTQ(RPTQOptions(**options)).subset(view)
        return view

    return make


def attention_of(query: Tensor, key: Tensor, value: Tensor) -> AttentionRanges:
    ranges = AttentionRanges()
    for states, seen in ((query, ranges.query), (key, ranges.key), (value, ranges.value)):
        seen.update(states)
    return ranges


def together(labels) -> set[frozenset[int]]:
    """The channels of each cluster."""
    return {frozenset(i for i, label in enumerate(labels) if label == one) for one in set(labels)}


SIZES = torch.tensor([1.0, 100.0, 1.0, 10.0, 100.0, 10.0, 1.0, 1.0])


def test_channels_of_a_size_share_a_cluster_and_its_range(solved):
    inputs = sequences(SIZES)
    grid = solved(QKV, inputs, R1_clusters=3, metric="minmax").clusters["input"]
    assert together(grid.labels) == {frozenset({0, 2, 6, 7}), frozenset({3, 5}), frozenset({1, 4})}
    for label in range(3):
        members = [i for i in range(8) if grid.labels[i] == label]
        assert grid.lo[label] == float(inputs[..., members].min())
        assert grid.hi[label] == float(inputs[..., members].max())


def test_by_default_ranges_are_a_moving_average_over_the_samples(solved):
    inputs = sequences(SIZES)
    grid = solved(DOWN, inputs, R5_clusters=1).clusters["input"]
    first, second, third = (float(sample.max()) for sample in inputs)
    assert grid.hi[0] == pytest.approx(0.99 * (0.99 * first + 0.01 * second) + 0.01 * third, rel=1e-6)


@pytest.mark.parametrize(("subset", "bits"), [(QKV, 8), (OUT, 4), (UP, 8), (DOWN, 4)])
def test_norms_keep_eight_bits(solved, subset, bits):
    assert solved(subset, sequences(torch.ones(24))).clusters["input"].bits == bits


def test_each_head_has_clusters_of_its_own_and_query_heads_share_those_of_their_value(solved):
    sizes = torch.tensor([[1.0, 9, 1, 9, 1, 1]] * 2 + [[5.0, 5, 5, 40, 40, 5]] * 2).flatten()
    attention = attention_of(sequences(sizes), sequences(sizes[:12]), sequences(sizes[:12], seed=3))
    view = solved(OUT, sequences(sizes), attention=attention, R3_clusters=2, metric="minmax")
    labels, values = view.clusters["input"].labels, view.clusters["value"].labels
    first, second = ({0, 2, 4, 5}, {1, 3}), ({0, 1, 2, 5}, {3, 4})
    expected = [
        {i + 6 * head for i in part} for head, parts in enumerate([first, first, second, second]) for part in parts
    ]
    assert together(labels) == {frozenset(part) for part in expected}
    assert together(values) == {
        frozenset(i + 6 * h for i in part) for h, parts in enumerate([first, second]) for part in parts
    }
    assert view.clusters["value"].bits == 4
    for head in range(4):
        own, shared = labels[6 * head : 6 * head + 6], values[6 * (head // 2) : 6 * (head // 2) + 6]
        assert torch.equal(torch.tensor(own).argsort(stable=True), torch.tensor(shared).argsort(stable=True))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("orderable", [True, False])
def test_a_key_shares_the_order_of_its_queries_and_pairs_stay_together(solved, orderable, sign):
    key = torch.tensor([1.0, 1, 30, 1, 1, 1, 2.0, 2, 2, 2, 50, 2])
    query = torch.ones(24)
    query[3] = 20  # of the first query head
    attention = attention_of(*(sign * sequences(sizes).abs() for sizes in (query, key, key)))
    subset = replace(QKV, orderable=orderable)
    view = solved(subset, sequences(torch.ones(8)), attention=attention, R2_clusters=2, metric="minmax")
    keys, queries = view.clusters["key"].labels, view.clusters["query"].labels
    for head in range(4):
        own, shared = queries[6 * head : 6 * head + 6], keys[6 * (head // 2) : 6 * (head // 2) + 6]
        assert together(own) == together(shared)
    # Behind sqrt(6), what the projection gives, the query's 20 outweighs the key's 30.
    expected = (
        {frozenset({3}), frozenset({0, 1, 2, 4, 5})} if orderable else {frozenset({0, 3}), frozenset({1, 2, 4, 5})}
    )
    assert together(keys[:6]) == expected
    if not orderable:
        assert all(keys[6 * h + i] == keys[6 * h + i + 3] for h in range(2) for i in range(3))
    assert len(view.clusters["query"].lo) == len(set(queries)) == 8


def test_only_keys_and_values_are_rounded_where_so_asked(solved):
    attention = attention_of(*(sequences(torch.ones(n)) for n in (24, 12, 12)))
    views = [
        solved(subset, sequences(torch.ones(24)), attention=attention, only_quant_kv=True) for subset in (QKV, OUT, UP)
    ]
    bits = {name: grid.bits for view in views for name, grid in view.clusters.items() if name != "input"}
    assert bits == {"query": None, "key": 4, "value": 4}
    assert {view.clusters["input"].bits for view in views} == {None}


def test_without_quantized_activations_there_are_clusters_for_the_weights(solved):
    view = solved(OUT, sequences(torch.ones(24)), act=None)
    assert {grid.bits for grid in view.clusters.values()} == {None}
    assert view.quantized["o"].scale.shape == (5, 16)


def cluster_grid(weight: Tensor, labels: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each weight, float64 from float32 numbers, one row and cluster at a time: the published
    ones, but for zero points beyond 9900, which get a larger scale."""
    scale, zero = torch.empty(weight.shape), torch.empty(weight.shape)
    for row in range(len(weight)):
        for label in labels.unique():
            lo, hi = weight[row, labels == label].min(), weight[row, labels == label].max()
            step = max(((hi - lo) / 2**bits).clamp(1e-4, 1e4), ((lo + hi) / 2).abs() / 9900)
            scale[row, labels == label] = step
            zero[row, labels == label] = (-(lo + hi) / (2 * step)).clamp(-1e4, 1e4).round()
    return scale.double(), zero.double()


def brain_surgeon(weight: Tensor, gram: Tensor, labels: Tensor, bits: int, damp: float = 0.01) -> Tensor:
    """Dense weight, cluster by cluster, with an explicit inverse that loses each column that is done."""
    scale, zero = cluster_grid(weight, labels, bits)
    work, hessian = weight.double().clone(), gram.double()
    inverse = torch.linalg.inv(hessian + damp * hessian.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64))
    dense, half = torch.zeros_like(work), 2 ** (bits - 1)
    for column in sorted(range(len(gram)), key=lambda column: (int(labels[column]), column)):
        codes = ((work[:, column] / scale[:, column]).round() + zero[:, column]).clamp(-half, half - 1)
        dense[:, column] = (codes - zero[:, column]) * scale[:, column]
        work -= torch.outer((work[:, column] - dense[:, column]) / inverse[column, column], inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0
    return dense


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("blocksize", [5, 128])
def test_weights_are_those_of_optimal_brain_quantization_over_the_clusters(solved, tokens, bits, blocksize):
    inputs = tokens(120, 24).reshape(3, 40, 24)
    view = solved(UP, inputs, spec=replace(SPEC, bits=bits), R4_clusters=5, blocksize=blocksize)
    labels = torch.tensor(view.clusters["input"].labels)
    assert len(labels.unique()) == 5 and (labels.diff() < 0).any()  # not runs of columns as they stand
    gram = inputs.flatten(0, 1).T @ inputs.flatten(0, 1)
    for name, module in view.linears.items():
        expected = brain_surgeon(module.weight.detach(), gram, labels, bits)
        assert torch.allclose(view.quantized[name].dequantize().double(), expected, rtol=0, atol=1e-5)
        assert view.notes[name].damp == 0.01


def test_nearest_is_nearest_and_worse(solved, tokens):
    inputs = tokens(120, 24).reshape(3, 40, 24)
    view, better = (solved(UP, inputs, w_quantizer=how, R4_clusters=5) for how in ("normal", "gptq"))
    labels = torch.tensor(view.clusters["input"].labels)
    weight = view.linears["up"].weight.detach()
    scale, zero = cluster_grid(weight, labels, 4)
    codes = ((weight / scale.float()).round().double() + zero).clamp(-8, 7)
    assert torch.equal(view.quantized["up"].dequantize(), ((codes - zero).float() * scale.float()))
    assert better.notes["up"].error < 0.9 * view.notes["up"].error


def test_a_column_alone_in_its_cluster_is_kept_by_its_zero_point(solved):
    sizes = torch.ones(8)
    sizes[3] = 1000
    view = solved(UP, sequences(sizes), R4_clusters=2, w_quantizer="normal")
    weight, kept = view.linears["up"].weight.detach(), view.quantized["up"]
    assert (weight[:, 3].abs() > 1).any()  # where the published zero point is clamped
    assert (kept.dequantize()[:, 3] - weight[:, 3]).abs().max() < 1e-4 * weight[:, 3].abs().max().clamp(min=1)
    assert kept.zero.dtype == torch.int16
