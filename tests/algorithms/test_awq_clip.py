"""AWQ's clipping, against measuring every shrink of every row and group on the tokens themselves."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from llmc.algorithms.awq import Awq, AwqOptions, search_clip
from llmc.models import Subset
from llmc.quant import Granularity, PerChannel, PerGroup, PerTensor, QuantSpec

COLUMNS, SHRINKS = 16, [1 - i / 20 for i in range(10)]


def weights(rows: int = 6, seed: int = 0) -> Tensor:
    """Some far from the others, so that clipping pays."""
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) ** 3


def brute_force(weight: Tensor, inputs: Tensor, spec: QuantSpec, nearest, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Ratios ``lo``, ``hi`` of each row and group: the least error of the group's part of the output. Asymmetric: the
    upper end first."""
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else COLUMNS
    lo, hi = torch.ones(2, len(weight), COLUMNS // size)
    for row, group in product(*map(range, lo.shape)):
        part = slice(group * size, (group + 1) * size)
        values, seen = weight[row : row + 1, part], inputs[:, part].double()
        alone = QuantSpec(spec.bits, spec.symmetric, PerChannel())

        def loss(pair: tuple[float, float], values=values, seen=seen, alone=alone) -> float:
            return (seen @ (nearest(values, alone, *pair) - values).double().T).square().sum().item()

        if symmetric:
            pair = min(((s, s) for s in SHRINKS), key=loss)
        else:
            upper = min(((1.0, s) for s in SHRINKS), key=loss)[1]
            pair = min(((s, upper) for s in SHRINKS), key=loss)
        lo[row, group], hi[row, group] = pair
    return lo, hi


@pytest.mark.parametrize("symmetric_grid", [True, False])
@pytest.mark.parametrize("symmetric_clip", [True, False])
@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(8)])
@pytest.mark.parametrize("bits", [2, 4])
def test_ratios_are_those_of_brute_force(
    tokens, nearest, symmetric_grid, symmetric_clip, granularity: Granularity, bits
):
    weight, inputs = weights(), tokens(100, COLUMNS)
    spec = QuantSpec(bits, symmetric_grid, granularity)
    found = search_clip(weight, inputs.T @ inputs, spec, symmetric=symmetric_clip)
    lo, hi = brute_force(weight, inputs, spec, nearest, symmetric=symmetric_clip)
    torch.testing.assert_close(found.lo, lo)
    torch.testing.assert_close(found.hi, hi)
    assert (torch.minimum(lo, hi) < 1).any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_worse_off_than_without_a_clip(tokens, nearest, symmetric, seed):
    weight, inputs = weights(32, seed), tokens(100, COLUMNS, seed)
    spec = QuantSpec(3, symmetric, PerGroup(8))
    clip = search_clip(weight, inputs.T @ inputs, spec, symmetric=symmetric)

    def errors(rounded: Tensor) -> Tensor:
        delta = (rounded - weight).unflatten(1, (-1, 8)).double()
        return torch.einsum("tgi,ogi->tog", inputs.unflatten(1, (-1, 8)).double(), delta).square().sum(0)

    assert (errors(nearest(weight, spec, clip.lo, clip.hi)) <= errors(nearest(weight, spec)) * 1.0001).all()


def test_one_range_for_all_rows_is_not_clipped(tokens):
    inputs = tokens(50, COLUMNS)
    clip = search_clip(weights(), inputs.T @ inputs, QuantSpec(4, True, PerTensor()), symmetric=True)
    assert clip.lo.tolist() == clip.hi.tolist() == [[1.0]]


@pytest.mark.parametrize("clip_sym", [None, True, False])
@pytest.mark.parametrize("symmetric_grid", [True, False])
def test_clips_are_searched_for_the_scaled_weights(make_view, tokens, nearest, clip_sym, symmetric_grid):
    inputs, spec = tokens(100, COLUMNS), QuantSpec(3, symmetric_grid, PerGroup(8))
    linear = nn.Linear(COLUMNS, 6)
    linear.weight.data = weights()
    subset = Subset(("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj", reads="ffn")
    view = make_view({"mlp.down_proj": linear}, [inputs], spec, subset=subset, prev=nn.Linear(4, COLUMNS))
    Awq(AwqOptions(clip_sym=clip_sym)).subset(view)
    scale = view.scale[0]
    symmetric = symmetric_grid if clip_sym is None else clip_sym
    lo, hi = brute_force(weights() * scale, inputs / scale, spec, nearest, symmetric=symmetric)
    torch.testing.assert_close(view.clips["mlp.down_proj"].lo, lo)
    torch.testing.assert_close(view.clips["mlp.down_proj"].hi, hi)


def test_queries_and_keys_are_not_clipped(make_view, tokens):
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    linears = {name: nn.Linear(COLUMNS, 4) for name in names}
    view = make_view(linears, [tokens(50, COLUMNS)], QuantSpec(3, True, PerChannel()))
    Awq(AwqOptions()).subset(view)
    assert view.clips.keys() == {"self_attn.v_proj"}


def test_clipping_can_be_turned_off(make_view, tokens):
    view = make_view({"fc": nn.Linear(COLUMNS, 4)}, [tokens(50, COLUMNS)], QuantSpec(3, True, PerChannel()))
    Awq(AwqOptions(weight_clip=False)).subset(view)
    assert not view.clips
