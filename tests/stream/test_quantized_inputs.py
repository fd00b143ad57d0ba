"""Activations are rounded where the deployed model rounds them, and nowhere else; static ranges survive a crash."""
# ruff: noqa: F811  (pytest finds imported fixtures by name)

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from test_engine import BLOCKS, Killed, Pass, close, equal, passes, quick, whole_model_losses  # noqa: F401
from torch import Tensor, nn

from llmc.algorithms import Ignored
from llmc.algorithms.gptq import GPTQ
from llmc.export.dense import FakeQuant
from llmc.export.vllm import VLLM
from llmc.quant import (
    ActSpec,
    HistogramMse,
    InputRange,
    MovingMinMax,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    StaticMinMax,
    fake_quantize_inputs,
)
from llmc.stream import stages

E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
INT8, FP8 = QuantSpec(8, True, PerChannel()), QuantSpec.floating("e4m3", PerChannel())
MX4, NV4 = QuantSpec.floating("e2m1", PerGroup(32), E8M0), QuantSpec.floating("e2m1", PerGroup(16), E4M3)
PER_TOKEN = ActSpec(QuantSpec(8, True, PerToken()))
STATIC = ActSpec(QuantSpec(8, False, PerTensor()), StaticMinMax())
SCHEMES = {
    "W8A8": (INT8, PER_TOKEN),
    "W8A8 static": (INT8, STATIC),
    "W4A4 groups": (QuantSpec(4, False, PerGroup(32)), ActSpec(QuantSpec(4, False, PerGroup(16)))),
    "W4A8": (QuantSpec(4, True, PerGroup(32)), PER_TOKEN),
    "FP8": (FP8, ActSpec(QuantSpec.floating("e4m3", PerToken()))),
    "FP8 static": (FP8, ActSpec(QuantSpec.floating("e4m3", PerTensor()), HistogramMse(256))),
    "FP8 blocks": (QuantSpec.floating("e4m3", PerBlock(48)), ActSpec(QuantSpec.floating("e4m3", PerGroup(32)))),
    "MXFP4": (MX4, ActSpec(MX4)),
    "NVFP4": (NV4, ActSpec(NV4, StaticMinMax())),
}


@contextmanager
def deployed(one: Pass, model: nn.Module, seen: dict[str, list[Tensor]] | None = None) -> Iterator[nn.Module]:
    """The model with rounded inputs, by hooks of the test's own; ``seen`` gets the inputs as they come."""
    hooks = []
    for index, row in enumerate(one.witness.rows):
        for subset in one.tiny.subsets:
            key = "+".join(subset.linears)
            found = InputRange(*row["inputs"][key]) if key in row["inputs"] else None
            for name in row["layers"].keys() & set(subset.linears):

                def round_input(module, args, found=found, name=f"{index} {name}"):
                    if seen is not None:
                        seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
                    return None if one.act is None else fake_quantize_inputs(args[0], one.act, found)

                linear = model.get_submodule(f"model.layers.{index}.{name}")
                hooks.append(linear.register_forward_pre_hook(round_input))
    yield model
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("method", "scheme"),
    [*(("RTN", scheme) for scheme in SCHEMES), ("GPTQ", "MXFP4"), ("GPTQ", "NVFP4"), ("GPTQ", "FP8 blocks")],
)
def test_the_evaluated_model_is_the_deployed_one(llama, passes, scheme, method):
    spec, act = SCHEMES[scheme]
    make = partial(passes, llama, method=method, spec=spec, formats=(FakeQuant,))
    one = make(act=act)
    losses = one.run().losses
    with deployed(one, one.written_model(FakeQuant)) as model:
        assert close(losses["fake_quant"], whole_model_losses(model, one.evaluation), 2e-6)
    assert not close(losses["fake_quant"], whole_model_losses(one.written_model(FakeQuant), one.evaluation), 1e-5)
    plain = make(positions=("pretrain", "transformed"))
    assert equal(losses["pretrain"], plain.run().losses["pretrain"])
    assert equal(losses["transformed"], losses["pretrain"])


@pytest.mark.parametrize(
    ("method", "observer"), [("RTN", MovingMinMax()), ("GPTQ", StaticMinMax()), ("Awq", HistogramMse(256))]
)
def test_static_ranges_are_those_of_what_the_deployed_model_reads(llama, passes, method, observer):
    one = passes(llama, method=method, spec=INT8, act=ActSpec(STATIC.grid, observer), formats=(FakeQuant,))
    one.run()
    seen: dict[str, list[Tensor]] = {}
    with deployed(one, one.written_model(FakeQuant), seen) as model, torch.no_grad():
        for batch in one.calib:
            model(input_ids=batch, use_cache=False)
    for index, row in enumerate(one.witness.rows):
        assert len(row["inputs"]) == len(llama.subsets)
        for key, found in row["inputs"].items():
            expected = observer.accumulator(STATIC.grid)
            for batch, tokens in zip(seen[f"{index} {key.split('+')[0]}"], one.calib, strict=True):
                expected.update(batch.reshape(*tokens.shape, -1))
            assert found == pytest.approx(expected.range(), rel=1e-4)


def test_with_quant_out_false_static_ranges_are_those_of_the_original(llama, passes):
    one = passes(llama, spec=INT8, act=STATIC, quant_out=False, formats=(FakeQuant,))
    one.run()
    seen: dict[str, list[Tensor]] = {}
    one.act = None
    with deployed(one, llama.model(), seen) as model, torch.no_grad():
        for batch in one.calib:
            model(input_ids=batch, use_cache=False)
    for index, row in enumerate(one.witness.rows):
        for key, found in row["inputs"].items():
            read = torch.cat(seen[f"{index} {key.split('+')[0]}"])
            assert found == pytest.approx([float(read.min()), float(read.max())], rel=1e-5)


def test_gptq_sees_what_the_deployed_model_reads_before_it_is_rounded(llama, passes, monkeypatch):
    grams: list[dict[str, Tensor]] = []
    solve = GPTQ.solve

    def spy(self, views):
        (view,) = views
        grams.append({name: view.stats.gram.matrix.clone() for name in view.linears})
        solve(self, views)

    monkeypatch.setattr(GPTQ, "solve", spy)
    one = passes(llama, method="GPTQ", spec=QuantSpec(4, False, PerGroup(32)), act=STATIC, formats=(FakeQuant,))
    one.run()
    seen: dict[str, list[Tensor]] = {}
    with deployed(one, one.written_model(FakeQuant), seen) as model, torch.no_grad():
        for batch in one.calib:
            model(input_ids=batch, use_cache=False)
    assert len(grams) == BLOCKS * len(llama.subsets)
    for number, gram in enumerate(grams):
        for name, matrix in gram.items():
            tokens = torch.cat(seen[f"{number // len(llama.subsets)} {name}"])
            torch.testing.assert_close(matrix, tokens.T @ tokens, rtol=1e-3, atol=1e-3 * float(matrix.abs().max()))


@pytest.mark.parametrize(
    ("method", "scheme"),
    [("RTN", "W8A8"), ("RTN", "FP8 static"), ("GPTQ", "NVFP4"), ("GPTQ", "W8A8 static"), ("Awq+GPTQ", "W8A8 static")],
)
def test_killed_and_replayed_it_ends_with_the_same_bytes_ranges_and_losses(llama, passes, method, scheme):
    spec, act = SCHEMES[scheme]
    make = partial(passes, llama, method=method, spec=spec, act=act, formats=(FakeQuant,), positions=("fake_quant",))
    calm, killed = make(), make(forward="replay", checkpoint_every=2)
    expected = calm.run()
    rows = {row["unit"]: row["inputs"] for row in calm.witness.rows}
    for fatal in (0, 2):
        with pytest.raises(Killed):
            killed.run(fatal)
    resumed = killed.run()
    assert killed.shards() == calm.shards()
    assert equal(resumed.losses["fake_quant"], expected.losses["fake_quant"])
    assert {row["unit"]: row["inputs"] for row in killed.witness.rows}.items() <= rows.items()


def test_static_scales_are_written_and_ignored_linears_read_what_they_read_before(llama, passes):
    one = passes(llama, spec=INT8, act=STATIC, formats=(VLLM,), ignored=Ignored(layers=frozenset({"mlp.down_proj"})))
    one.run()
    for index, row in enumerate(one.witness.rows):
        assert "mlp.down_proj" not in row["inputs"]
        stored = load_file(one.sinks()[0].shard(f"block-{index}"))
        for key, (lo, hi) in row["inputs"].items():
            lo, hi = min(lo, 0), max(hi, 0)
            for name in key.split("+"):
                scale = stored[f"model.layers.{index}.{name}.input_scale"]
                zero = stored[f"model.layers.{index}.{name}.input_zero_point"]
                assert (scale.dtype, zero.dtype) == (torch.float32, torch.int8)
                assert scale.item() == pytest.approx((hi - lo) / 255)
                assert zero.item() == round(-128 - lo / scale.item())


def test_rtn_with_static_ranges_takes_one_forward_a_block(llama, passes, monkeypatch):
    calls = []
    one = passes(llama, spec=INT8, act=STATIC, positions=(), formats=(FakeQuant,))
    forward = stages.BlockRun.forward
    monkeypatch.setattr(stages.BlockRun, "forward", lambda self, batch: (calls.append(batch), forward(self, batch))[1])
    one.run()
    assert len(calls) == BLOCKS * len(one.calib)
