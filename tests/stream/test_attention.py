"""Attention over a quantized cache: the whole window at once is the same as token by token, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from llmc.errors import ModelError
from llmc.linalg import OnlineRotation, hadamard
from llmc.quant import Fp8Grid, IntGrid, KvCache, KvRanges, KvSpec, PerGroup, PerTensor, PerToken
from llmc.stream import attention
from llmc.stream.attention import CachedAttention, attending, attending_to_cache, cache_ranges, check_attention

BATCH, HEADS, KV_HEADS, TOKENS, DIM = 2, 4, 2, 43, 16
RANGES = KvRanges((-3.0, 2.5), (-1.5, 2.0))
KIVI = KvSpec("Kivi", IntGrid(2, False, offset=True), PerGroup(4), residual=8)
SPECS = [
    KvSpec("Naive", IntGrid(2, False), PerToken()),
    KvSpec("Naive", Fp8Grid(torch.float8_e4m3fn), PerTensor(), static=True),
    KIVI,
    KvSpec("Kivi", IntGrid(4, True), PerToken(), residual=5),
    KvSpec("Kivi", IntGrid(2, False, offset=True), PerGroup(2), residual=64),
]


class Module(nn.Module):
    """What the attention function asks of the module that calls it."""

    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


def made(heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, heads, TOKENS, DIM, generator=generator, dtype=torch.float64)


@pytest.fixture
def window() -> tuple[Tensor, Tensor, Tensor]:
    return made(HEADS, 1), made(KV_HEADS, 2) * 2 + 1, made(KV_HEADS, 3)


def token_by_token(query, key, value, spec, allowed=None):
    """One softmax for each token and head over what the cache shows."""
    result = torch.zeros(BATCH, TOKENS, HEADS, DIM, dtype=torch.float64)
    cache = KvCache(None if spec is None else spec.scheme(RANGES), TOKENS)
    for t in range(TOKENS):
        keys, values = cache.append(key[:, :, t : t + 1], value[:, :, t : t + 1])
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            scores = (keys[:, kv] @ query[:, head, t, :, None]).squeeze(-1) / math.sqrt(DIM)
            if allowed is not None:
                scores = scores.masked_fill(~allowed[t, : t + 1], -math.inf)
            result[:, t, head] = (scores.softmax(-1)[:, None] @ values[:, kv]).squeeze(1)
    return result


@pytest.fixture(params=[10**6, 7], ids=["at once", "7 queries at a time"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(attention, "_QUERIES", request.param)


SLIDING = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).clamp(min=-1)
SLIDING = (SLIDING >= 0) & (SLIDING < 11)


@pytest.mark.parametrize("decode", [False, True], ids=["window", "decode"])
@pytest.mark.parametrize("mask", ["causal", "bool", "added"])
@pytest.mark.parametrize("spec", [None, *SPECS], ids=lambda spec: spec.describe() if spec else "full")
def test_a_window_is_attended_as_a_decoder_would(window, chunks, spec, mask, decode):
    allowed = None if mask == "causal" else SLIDING
    given = None if allowed is None else allowed.expand(BATCH, 1, TOKENS, TOKENS)
    if mask == "added":
        given = torch.zeros(given.shape, dtype=torch.float64).masked_fill(~given, -math.inf)
    function = CachedAttention(None if spec is None else spec.scheme(RANGES), decode=decode)
    found, weights = function(Module(), *window, given, scaling=DIM**-0.5)
    assert weights is None
    assert (found - token_by_token(*window, spec, allowed)).abs().max() < 1e-12


@pytest.mark.parametrize("spec", SPECS, ids=KvSpec.describe)
def test_what_lies_ahead_changes_nothing(window, spec):
    function = CachedAttention(spec.scheme(RANGES), decode=False)
    before, _ = function(Module(), *window, None)
    changed = [state.clone() for state in window]
    for state in changed:
        state[:, :, 29:] *= -3
    after, _ = function(Module(), *changed, None)
    assert torch.equal(before[:, :29], after[:, :29])
    assert not torch.equal(before[:, 29:], after[:, 29:])


def test_a_residual_longer_than_the_window_is_full_precision(window):
    found, _ = CachedAttention(SPECS[-1].scheme(None), decode=False)(Module(), *window, None)
    assert (found - token_by_token(*window, None)).abs().max() < 1e-12


def test_coarse_codes_show_in_what_a_long_window_attends_to(window):
    exact = token_by_token(*window, None)
    found, _ = CachedAttention(KIVI.scheme(None), decode=False)(Module(), *window, None)
    change = (found - exact).abs().amax(dim=(0, 2, 3))
    assert change[:8].max() < 1e-12  # the residual: nothing is quantized yet
    assert change[9:].min() > 1e-3


TURN = OnlineRotation(hadamard(DIM))
DENSE = hadamard(DIM).matrix().double() / DIM**0.5


@pytest.mark.parametrize("decode", [False, True], ids=["window", "decode"])
@pytest.mark.parametrize("spec", [None, *SPECS], ids=lambda spec: spec.describe() if spec else "full")
def test_a_cache_may_hold_rotated_keys(window, spec, decode):
    query, key, value = window
    function = CachedAttention(None if spec is None else spec.scheme(RANGES), decode=decode, rotation=TURN)
    found, _ = function(Module(), query, key, value, None, scaling=DIM**-0.5)
    assert (found - token_by_token(query @ DENSE, key @ DENSE, value, spec)).abs().max() < 1e-12
    if spec is None:
        assert (found - token_by_token(query, key, value, None)).abs().max() < 1e-12


def test_rotated_keys_suffer_less_from_a_channel_that_stands_out(window):
    query, key, value = window
    key = key.clone()
    key[..., 3] *= 20
    spec = KvSpec("Naive", IntGrid(4, False), PerToken())
    exact = token_by_token(query, key, value, None)
    plain, turned = (
        (CachedAttention(spec.scheme(None), decode=False, rotation=r)(Module(), query, key, value, None)[0] - exact)
        for r in (None, TURN)
    )
    assert turned.norm() < 0.7 * plain.norm()


def test_where_keys_are_not_quantized_nothing_is_rotated(llama, tokens):
    def never(rows: Tensor) -> Tensor:
        raise AssertionError("rotated")

    model = llama.model()
    static = KvSpec("Naive", Fp8Grid(torch.float8_e4m3fn), PerTensor(), static=True)
    for kv, decode in ((None, False), (None, True), (static, False)):
        with attending_to_cache(model, kv, None, decode=decode, rotation=never):
            model(input_ids=tokens(1, 4), use_cache=False)
    with (
        pytest.raises(AssertionError, match="rotated"),
        attending_to_cache(model, KIVI, None, decode=False, rotation=never),
    ):
        model(input_ids=tokens(1, 4), use_cache=False)


# --- registered with Transformers ------------------------------------------------------------------------------------


def test_every_familys_attention_goes_through_a_registered_function(tiny, tokens):
    model, calls = tiny.model(), []

    def function(module, query, key, value, mask, **options):
        calls.append((type(module).__name__, tuple(key.shape), tuple(value.shape)))
        return attention._sdpa()(module, query, key, value, mask, **options)

    ids = tokens(2, 12)
    before = model(input_ids=ids, use_cache=False).logits
    with attending(model, function):
        within = model(input_ids=ids, use_cache=False).logits
    after = model(input_ids=ids, use_cache=False).logits
    heads = getattr(tiny.config, "num_key_value_heads", 4)
    assert [call[1:] for call in calls] == [((2, heads, 12, 16),) * 2] * 4
    assert torch.equal(before, within)
    assert torch.equal(before, after)
    assert model.config._attn_implementation == "sdpa"


def test_a_context_within_another_gives_back_the_outer_function(llama, tokens):
    model, heard = llama.model(), []

    def named(name):
        def function(*args, **options):
            heard.append(name)
            return attention._sdpa()(*args, **options)

        return function

    with attending(model, named("outer")):
        with attending(model, named("inner")):
            model(input_ids=tokens(1, 4), use_cache=False)
        model(input_ids=tokens(1, 4), use_cache=False)
    assert heard == ["inner"] * 4 + ["outer"] * 4


def test_a_failure_within_the_context_gives_back_sdpa(llama):
    model = llama.model()
    with pytest.raises(ZeroDivisionError), attending(model, CachedAttention(None, decode=False)):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


def test_a_model_with_an_attention_of_its_own_is_refused(llama, monkeypatch):
    model = llama.skeleton().model
    check_attention(model)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda kind: False))
    with pytest.raises(ModelError, match="doesn't go through Transformers' attention interface"):
        check_attention(model)
    monkeypatch.undo()
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="'eager'"):
        check_attention(model)


class Forwards(list):
    """Stands in for a block with its inputs."""

    inputs = property(lambda self: self)

    def forward(self, batch):
        return self[batch]()


def test_ranges_are_those_of_rotated_keys_and_of_values(llama, tokens):
    model, seen = llama.model(), []

    def function(module, query, key, value, mask, **options):
        if module.layer_idx == 0:
            seen.append((key, value))
        return attention._sdpa()(module, query, key, value, mask, **options)

    batches = [tokens(2, 12, seed=1), tokens(1, 9, seed=2)]
    with attending(model, function):
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    keys, values = (torch.cat([state.flatten() for state in states]) for states in zip(*seen, strict=True))
    found = cache_ranges(model, Forwards([lambda ids=ids: model(input_ids=ids, use_cache=False) for ids in batches]))
    assert found == KvRanges((keys.min().item(), keys.max().item()), (values.min().item(), values.max().item()))
    forwards = Forwards([lambda ids=ids: model(input_ids=ids, use_cache=False) for ids in batches])
    turned = keys.reshape(-1, DIM) @ DENSE.float()
    rotated = cache_ranges(model, forwards, TURN)
    assert rotated.value == found.value
    assert rotated.key == pytest.approx((turned.min().item(), turned.max().item()), rel=1e-5)


def test_ranges_of_what_has_no_attention(llama):
    with pytest.raises(ModelError, match="no attention"):
        cache_ranges(llama.model(), Forwards([lambda: None]))
