"""Rotations that run with the model in the pass over the blocks, against dense ones in Transformers' own model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_engine import FP8, KIVI, Killed, Pass, close, equal, passes, quick, whole_model_losses
from torch import Tensor, nn

from llmc.algorithms.gptq import GPTQ
from llmc.algorithms.quarot import QuarotOptions
from llmc.export.dense import FakeQuant, Transformed
from llmc.linalg import hadamard
from llmc.quant import ActSpec, KvRanges, PerChannel, PerToken, QuantSpec, fake_quantize_inputs
from llmc.stream.attention import CachedAttention, attending

__all__ = ["passes", "quick"]  # fixtures
FFN, DIM = 128, 16
W4, A4 = QuantSpec(4, True, PerChannel()), ActSpec(QuantSpec(4, True, PerToken()))
ONLINE = {"Quarot": QuarotOptions(online_rotate=True)}
FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "opt"]


def dense(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (hadamard(size).matrix().double() / size**0.5).to(dtype)


@contextmanager
def deployed(one: Pass, model: nn.Module, *, act: ActSpec | None) -> Iterator[nn.Module]:
    """The model with rotated and rounded inputs, by hooks of the test's own."""
    linears = {name for subset in one.tiny.subsets for name in subset.linears}

    def hook(module: nn.Module, args: tuple[Any, ...], last: bool) -> tuple[Tensor]:
        inputs = args[0] @ dense(FFN, args[0].dtype) if last else args[0]
        return (inputs if act is None else fake_quantize_inputs(inputs, act),)

    hooks = []
    for path, module in model.named_modules():
        if any(path.endswith(f".{name}") for name in linears):
            last = path.endswith(("down_proj", "fc2"))
            hooks.append(module.register_forward_pre_hook(lambda m, args, last=last: hook(m, args, last)))
    yield model
    for handle in hooks:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_both_evaluated_models_are_the_deployed_ones(checkpoint, passes, family):
    one = passes(checkpoint(family), method="Quarot+GPTQ", options=ONLINE, spec=W4, act=A4, dtype=torch.float64)
    one.formats = (FakeQuant, Transformed)
    losses = one.run().losses
    for state, kind, act in (("transformed", Transformed, None), ("fake_quant", FakeQuant, A4)):
        model = one.written_model(kind).double()
        with deployed(one, model, act=act):
            assert close(losses[state], whole_model_losses(model, one.evaluation), 1e-5), state
        assert not close(losses[state], whole_model_losses(model, one.evaluation), 1e-3), state
    assert close(losses["pretrain"], whole_model_losses(one.tiny.model().double(), one.evaluation))
    assert close(losses["transformed"], losses["pretrain"], 1e-2), "but for bfloat16"


@pytest.mark.parametrize("forward", ["staged", "replay"])
def test_statistics_are_of_the_rotated_input(llama, passes, monkeypatch, forward):
    """In the first block nothing else differs from a run without."""
    solve, seen = GPTQ.solve, []

    def spy(self: GPTQ, views: Any) -> None:
        (view,) = views
        seen.append((view.subset.linears, view.stats.gram.matrix.double()))
        solve(self, views)

    monkeypatch.setattr(GPTQ, "solve", spy)
    grams = {}
    for name, options in (("online", ONLINE), ("offline", {})):
        passes(llama, method="Quarot+GPTQ", options=options, forward=forward, formats=(FakeQuant,)).run()
        grams |= {(name, linears): gram for linears, gram in seen[: len(llama.subsets)]}
        seen.clear()
    for subset in llama.subsets:
        found, plain = grams["online", subset.linears], grams["offline", subset.linears]
        if subset.reads == "ffn":
            turn = dense(FFN, torch.float64)
            assert (found - plain).norm() > 0.1 * plain.norm()
            plain = turn.T @ plain @ turn
        assert (found - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("method", ["Quarot+Awq", "Quarot+Awq+GPTQ"])
def test_staged_and_replayed_forwards_write_the_same_bytes(llama, passes, method):
    made = {}
    for forward in ("staged", "replay"):
        one = passes(llama, method=method, options=ONLINE, act=A4, forward=forward, formats=(FakeQuant,))
        made[forward] = one.run().losses, one.shards()
        scaled = {key for row in one.witness.rows for key in row["scales"]}
        assert "mlp.gate_proj+mlp.up_proj" in scaled
        assert "mlp.down_proj" not in scaled, "through the rotation nothing absorbs a scale"
    (left, first), (right, second) = made.values()
    assert first == second
    assert all(equal(left[state], right[state]) for state in left)


@pytest.mark.parametrize("fatal", [0, 2])
def test_a_killed_run_ends_with_the_same_bytes(llama, passes, fatal):
    def make() -> Pass:
        kv = {"kv": FP8, "decoded": ("fake_quant",)}
        return passes(
            llama, method="Quarot+GPTQ", options=ONLINE, spec=W4, act=A4, formats=(FakeQuant, Transformed), **kv
        )

    calm, disturbed = make(), make()
    expected = calm.run()
    with pytest.raises(Killed):
        disturbed.run(fatal)
    found = disturbed.run()
    assert disturbed.shards() == calm.shards()
    assert all(equal(found.losses[state], expected.losses[state]) for state in expected.losses)
    assert equal(found.decoded["fake_quant"], expected.decoded["fake_quant"])


@pytest.mark.parametrize("kv", [KIVI, FP8], ids=lambda kv: kv.describe())
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_a_quantized_cache_holds_rotated_keys(checkpoint, passes, family, kv):
    one = passes(checkpoint(family), method="Quarot", options=ONLINE, kv=kv, dtype=torch.float64)
    one.formats, one.positions, one.decoded = (FakeQuant,), ("fake_quant", "fake_quant_wo_kv"), ("fake_quant",)
    outcome = one.run()
    model = one.written_model(FakeQuant).double()
    turn = dense(DIM, torch.float64)

    def attention(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        found = one.witness.rows[module.layer_idx]["cache_ranges"]
        ranges = None if found is None else KvRanges(tuple(found["key"]), tuple(found["value"]))
        return CachedAttention(kv.scheme(ranges), decode=False)(module, query @ turn, key @ turn, *rest, **options)

    with deployed(one, model, act=None), attending(model, attention):
        expected = whole_model_losses(model, one.evaluation)
    assert close(outcome.losses["fake_quant"], expected, 1e-5)
    assert close(outcome.decoded["fake_quant"], expected, 1e-5)
    assert not close(outcome.losses["fake_quant_wo_kv"], expected, 1e-4)
