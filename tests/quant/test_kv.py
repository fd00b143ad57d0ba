"""Grids of a KV cache against formulas written out, and what a token sees against a list that grows by one."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmc.quant import Fp8Grid, IntGrid, KvCache, KvRanges, KvSpec, PerGroup, PerTensor, PerToken, cache_qparams
from llmc.quant.kv import by_channel, by_token, by_whole_token, on_grid

BATCH, HEADS, TOKENS, DIM = 2, 2, 37, 8
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RANGES = KvRanges((-3.0, 2.5), (-1.5, 2.0))
SPECS = [
    KvSpec("Naive", IntGrid(2, False), PerToken()),
    KvSpec("Naive", IntGrid(4, True), PerGroup(4)),
    KvSpec("Naive", IntGrid(8, False, offset=True), PerTensor()),
    KvSpec("Naive", Fp8Grid(E4M3), PerToken()),
    KvSpec("Naive", Fp8Grid(E4M3), PerTensor(), static=True),
    KvSpec("Naive", IntGrid(4, False), PerTensor(), static=True),
    KvSpec("Kivi", IntGrid(2, False, offset=True), PerGroup(4), residual=8),
    KvSpec("Kivi", IntGrid(4, True), PerToken(), residual=5),
    KvSpec("Kivi", IntGrid(2, False, offset=True), PerGroup(2), residual=64),
]


def states(seed: int, tokens: int = TOKENS, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, HEADS, tokens, DIM, generator=generator) + shift


def nearest(values: list[float], points: list[float]) -> list[float]:
    return [min(points, key=lambda point: abs(point - value)) for value in values]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_offset_grid_has_its_levels_between_minimum_and_maximum(bits):
    values = (states(bits)[0, 0, 0] + 20).to(torch.float16).float()
    lo, hi = float(values.min()), float(values.max())
    step = float(torch.tensor((hi - lo) / (2**bits - 1)).half())
    points = [lo + step * code for code in range(2**bits)]
    found = on_grid(values, IntGrid(bits, symmetric=False, offset=True))
    assert found.tolist() == pytest.approx(nearest(values.tolist(), points), rel=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_integer_zero_point_is_a_level_and_the_range_includes_it(bits, symmetric):
    values = states(bits)[0, 0, 0] + 0.5
    lo, hi = min(float(values.min()), 0), max(float(values.max()), 0)
    levels = 2**bits - 1
    step = float(torch.tensor(max(-lo, hi) / (levels // 2) if symmetric else (hi - lo) / levels).half())
    first = -(2 ** (bits - 1)) if symmetric else -min(max(round(-lo / step), 0), levels)
    found = on_grid(values, IntGrid(bits, symmetric))
    assert found.tolist() == pytest.approx(nearest(values.tolist(), [(first + c) * step for c in range(levels + 1)]))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_float_grid_holds_the_casts_of_scaled_values_and_saturates(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    points = sorted(set(codes[codes.isfinite()].tolist()))
    values = states(1)[0].flatten()
    scale = float(values.abs().max() / points[-1])
    found = on_grid(values, Fp8Grid(dtype))
    assert (found / scale).tolist() == pytest.approx(nearest((values / scale).tolist(), points))
    beyond = Fp8Grid(dtype).round(torch.tensor([1e6, -1e6]), torch.tensor(2.0), torch.tensor(0.0))
    assert beyond.tolist() == [2 * points[-1], -2 * points[-1]]


def test_scales_are_rounded_before_codes_are_computed():
    values = torch.tensor([0.0, 1000.1])
    for grid in (IntGrid(8, True), IntGrid(8, False, offset=True), Fp8Grid(E4M3, torch.float16)):
        scale, _ = grid.qparams(values.amin(), values.amax())
        assert scale == scale.half()
        code = on_grid(values, grid)[1] / scale
        assert code == code.round()


def test_a_group_without_extent_is_kept():
    same = torch.full((4,), 3.25)
    assert torch.equal(on_grid(same, IntGrid(2, False, offset=True)), same)
    assert torch.equal(on_grid(torch.zeros(4), Fp8Grid(E4M3)), torch.zeros(4))


def test_who_shares_a_scale():
    grid, x = IntGrid(3, False, offset=True), states(3)
    channel = by_channel(x, grid, 5)
    for b, h, t in [(0, 0, 0), (1, 0, 7), (0, 1, 36)]:
        token = x[b, h, t]
        assert torch.equal(by_token(x, grid, None)[b, h, t], on_grid(token, grid))
        assert torch.equal(
            by_token(x, grid, 4)[b, h, t], torch.cat([on_grid(token[:4], grid), on_grid(token[4:], grid)])
        )
        assert torch.equal(by_whole_token(x, grid)[b, :, t].flatten(), on_grid(x[b, :, t].flatten(), grid))
        start = t // 5 * 5
        expected = on_grid(x[b, h, start : start + 5, 2], grid)[t - start] if start + 5 <= TOKENS else x[b, h, t, 2]
        assert channel[b, h, t, 2] == expected


def test_a_static_cache_has_one_scale_for_the_layer():
    scheme = SPECS[4].scheme(RANGES)
    x = states(5)
    assert torch.equal(scheme.keys(x), ((x / (3 / 448)).clamp(-448, 448).to(E4M3).float() * torch.tensor(3 / 448)))
    assert torch.equal(scheme.values(x), (x / (2 / 448)).clamp(-448, 448).to(E4M3).float() * torch.tensor(2 / 448))
    assert cache_qparams(Fp8Grid(E4M3), RANGES.key)[0].item() == pytest.approx(3 / 448)
    with pytest.raises(ValueError, match="calibrated"):
        SPECS[4].scheme(None)


def kivi_by_lists(x: Tensor, spec: KvSpec, *, key: bool) -> list[list[Tensor]]:
    """What each token of ``x [tokens, dim]`` sees, by the published code's bookkeeping: two lists and their lengths."""
    done: list[Tensor] = []
    residual: list[Tensor] = []
    seen = []
    group = spec.group
    for token in x:
        residual.append(token)
        seen.append([*done, *residual])
        if key and len(residual) == spec.residual:
            block = torch.stack(residual)
            parts = block.split(group or spec.residual)
            done += [row for part in parts for row in torch.stack([on_grid(c, spec.grid) for c in part.T], dim=1)]
            residual = []
        if not key and len(residual) > spec.residual:
            oldest = residual.pop(0)
            done.append(torch.cat([on_grid(part, spec.grid) for part in oldest.split(group or DIM)]))
    return seen


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.method == "Kivi"], ids=KvSpec.describe)
def test_kivi_shows_each_token_what_two_lists_would(spec):
    k, v = states(6, shift=3.0), states(7)
    cache = KvCache(spec.scheme(None), TOKENS)
    keys, values = kivi_by_lists(k[1, 0], spec, key=True), kivi_by_lists(v[1, 0], spec, key=False)
    for t in range(TOKENS):
        seen_keys, seen_values = cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        assert torch.equal(seen_keys[1, 0], torch.stack(keys[t]))
        assert torch.equal(seen_values[1, 0], torch.stack(values[t]))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.method == "Naive"], ids=KvSpec.describe)
def test_naive_shows_each_token_all_tokens_quantized_also_itself(spec):
    k, v = states(8), states(9)
    scheme = spec.scheme(RANGES)
    cache = KvCache(scheme, TOKENS)
    for t in range(TOKENS):
        seen_keys, seen_values = cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        assert torch.equal(seen_keys, scheme.keys(k[:, :, : t + 1]))
        assert torch.equal(seen_values, scheme.values(v[:, :, : t + 1]))
        assert not torch.equal(seen_keys, k[:, :, : t + 1])


@pytest.mark.parametrize("spec", SPECS, ids=KvSpec.describe)
def test_an_entry_is_quantized_once_and_never_changes_again(spec):
    k, v = states(10), states(11)
    cache = KvCache(spec.scheme(RANGES), TOKENS)
    history = []
    for t in range(TOKENS):
        history.append([part.clone() for part in cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])])
    for which, original in enumerate((k, v)):
        for before, after in pairwise(history):
            old, new = before[which], after[which][:, :, :-1]
            first = torch.eq(old, original[:, :, : old.shape[2]])
            assert (torch.eq(old, new) | first).all()


def test_a_cache_without_a_scheme_keeps_everything():
    k, v = states(12), states(13)
    cache = KvCache(None, TOKENS)
    for t in range(TOKENS):
        seen = cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        assert torch.equal(seen[0], k[:, :, : t + 1])
        assert torch.equal(seen[1], v[:, :, : t + 1])


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(0, 300))
def test_kivi_counts(residual, position):
    scheme = KvSpec("Kivi", IntGrid(2, False), PerToken(), residual=residual).scheme(None)
    at = torch.tensor([position, position + 1])
    keys, values = scheme.quantized_keys(at), scheme.quantized_values(at)
    assert 0 <= position - int(keys[0]) < residual
    assert int(keys[0]) % residual == 0
    assert int(values[0]) == max(0, position - residual)
    assert (values <= keys).all()
    assert keys[0] <= keys[1]
    assert values[0] <= values[1]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (KvSpec("Naive", IntGrid(4, True), PerToken()), 4 + 16 / 64),
        (KvSpec("Naive", IntGrid(4, False), PerGroup(32)), 4 + 20 / 32),
        (KvSpec("Naive", IntGrid(8, False, offset=True), PerTensor()), 8 + 32 / 192),
        (KvSpec("Naive", Fp8Grid(E4M3), PerTensor(), static=True), 8),
        (KvSpec("Kivi", IntGrid(2, False, offset=True), PerGroup(32), residual=128), 2 + 32 / 32),
        (KvSpec("Kivi", IntGrid(2, False, offset=True), PerToken(), residual=128), 2 + (32 / 128 + 32 / 64) / 2),
    ],
    ids=lambda value: value.describe() if isinstance(value, KvSpec) else "",
)
def test_bits_count_the_scales(spec, expected):
    assert spec.bits_an_element(heads=3, dim=64) == pytest.approx(expected)


def test_a_spec_becomes_plain_values():
    plain = json.loads(json.dumps(SPECS[6].to_dict()))
    assert plain["granularity"] == {"kind": "PerGroup", "size": 4}
    assert plain["grid"] == {"kind": "IntGrid", "bits": 2, "symmetric": False, "offset": True, "scale_dtype": "float16"}
    assert json.loads(json.dumps(SPECS[4].to_dict()))["grid"]["dtype"] == "float8_e4m3fn"
