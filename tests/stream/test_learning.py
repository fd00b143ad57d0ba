"""A learned block: what was learned is what is written, in the loss that was promised, also after an interruption."""
# ruff: noqa: F811  (pytest finds imported fixtures by name)

from __future__ import annotations

import pytest
import torch
from test_engine import BLOCKS, Killed, Pass, close, passes, quick, whole_model_losses  # noqa: F401
from test_quantized_inputs import deployed
from torch import Tensor, nn

from llmc.algorithms import Ignored
from llmc.algorithms.omniquant import OmniQuantOptions
from llmc.export.dense import FakeQuant
from llmc.quant import ActSpec, Fp8Grid, KvSpec, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec

W3 = QuantSpec(3, False, PerGroup(32), scale_dtype=torch.bfloat16)
W4, A4 = QuantSpec(4, True, PerChannel()), ActSpec(QuantSpec(4, True, PerToken()))
CLIPS = {"OmniQuant": OmniQuantOptions(epochs=2, lwc_lr=0.05)}
SCALES = {"OmniQuant": OmniQuantOptions(epochs=2, lwc_lr=0.05, let=True, smooth_up_down=True, aug_loss=True)}
CASES = {
    "clips": {"spec": W3, "options": CLIPS},
    "scales": {"spec": W4, "act": A4, "options": SCALES},
    "Awq": {"spec": W3, "options": CLIPS, "method": "Awq+OmniQuant"},
}


@pytest.fixture
def learned(llama, passes):
    """Makes passes of OmniQuant; two batches of one sample each, so that a mean over batches is one over tokens."""

    def make(case: str, tiny=llama, **changes) -> Pass:
        one = passes(tiny, **{"method": "OmniQuant", "formats": (FakeQuant,), **CASES[case], **changes})
        one.calib = [batch[:1] for batch in one.calib]
        return one

    return make


@torch.no_grad()
def block_outputs(model: nn.Module, batches: list[Tensor], layers: str) -> list[list[Tensor]]:
    """Output of each block in runs of the model's own code: by batch, then block."""
    found: list[list[Tensor]] = []
    for batch in batches:
        outputs: list[Tensor] = []
        hooks = [
            block.register_forward_hook(
                lambda m, a, out, o=outputs: o.append(out[0] if isinstance(out, tuple) else out)
            )
            for block in model.get_submodule(layers)
        ]
        model(input_ids=batch, use_cache=False)
        found.append(outputs)
        for hook in hooks:
            hook.remove()
    return found


def distances(compressed: list[list[Tensor]], original: list[list[Tensor]]) -> list[float]:
    """Mean squared error behind each block."""
    pairs = [
        [(a - b).square().mean() for a, b in zip(*one, strict=True)] for one in zip(compressed, original, strict=True)
    ]
    return [float(sum(errors) / len(errors)) for errors in zip(*pairs, strict=True)]


@pytest.mark.parametrize("case", ["clips", "Awq"])
def test_the_noted_loss_is_that_of_the_written_model(llama, learned, case):
    """Each block's target is the original's output, its input that of the written blocks before it."""
    one = learned(case)
    one.run()
    outputs = [block_outputs(m, one.calib, "model.layers") for m in (one.written_model(FakeQuant), llama.model())]
    notes = [row["tuning"] for row in one.witness.rows]
    assert distances(*outputs) == pytest.approx([note["end"] for note in notes], rel=1e-4)
    assert all(note["end"] <= note["start"] for note in notes)
    assert sum(note["epoch"] > 0 for note in notes) >= 2


def test_the_noted_loss_is_that_of_the_deployed_model_with_rounded_inputs(llama, learned):
    one = learned("scales", options=CLIPS)
    one.run()
    original = block_outputs(llama.model(), one.calib, "model.layers")
    with deployed(one, one.written_model(FakeQuant)) as model:
        found = distances(block_outputs(model, one.calib, "model.layers"), original)
    first = one.witness.rows[0]["tuning"]["end"]  # further on, a rounding may tip over
    assert found[0] == pytest.approx(first, rel=1e-4)
    plain = distances(block_outputs(one.written_model(FakeQuant), one.calib, "model.layers"), original)
    assert plain[0] < 0.9 * first, "rounded inputs matter"


def test_the_noted_loss_is_that_of_the_written_model_with_learned_scales(llama, learned):
    """But for the norms, which are rounded to their stored dtype when they're folded."""
    options = {"OmniQuant": SCALES["OmniQuant"].model_copy(update={"aug_loss": False})}
    one = learned("scales", act=None, options=options)
    one.run()
    outputs = [block_outputs(m, one.calib, "model.layers") for m in (one.written_model(FakeQuant), llama.model())]
    assert distances(*outputs) == pytest.approx([row["tuning"]["end"] for row in one.witness.rows], rel=0.02)


def test_without_quant_out_each_block_learns_on_the_originals_inputs(llama, learned):
    one = learned("clips", quant_out=False)
    one.run()
    model, written = llama.model(), one.written_model(FakeQuant)
    original = block_outputs(model, one.calib, "model.layers")
    for index, row in enumerate(one.witness.rows):
        mixed = llama.model()
        mixed.model.layers[index] = written.model.layers[index]
        found = block_outputs(mixed, one.calib, "model.layers")
        errors = [float((a[index] - b[index]).square().mean()) for a, b in zip(found, original, strict=True)]
        assert sum(errors) / len(errors) == pytest.approx(row["tuning"]["end"], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_evaluated_model_is_the_deployed_one(llama, learned, case):
    one = learned(case)
    losses = one.run().losses
    with deployed(one, one.written_model(FakeQuant)) as model:
        assert close(losses["fake_quant"], whole_model_losses(model, one.evaluation), 2e-6)
    assert close(losses["pretrain"], whole_model_losses(llama.model(), one.evaluation))


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_with_the_same_bytes(learned, case):
    calm = learned(case)
    calm.run()
    one = learned(case, checkpoint_every=2, budget=0)  # streams in mapped files make no difference
    for fatal in (0, 2):
        with pytest.raises(Killed):
            one.run(fatal=fatal)
    one.run()
    assert one.shards() == calm.shards()


def test_each_weight_is_read_once(llama, learned):
    assert learned("scales").run().bytes_read == sum(entry.nbytes for entry in llama.entries.values())


@pytest.mark.parametrize("name", ["opt", "opt-post-norm", "qwen3", "llama-tied"])
def test_scales_and_shifts_of_other_families(checkpoint, learned, name):
    """The model behind the folds is what is evaluated; where there are biases, they absorb a shift."""
    tiny = checkpoint(name)
    one = learned("scales", tiny)
    losses = one.run().losses
    folded = {"opt": 4, "opt-post-norm": 2, "qwen3": 4, "llama-tied": 4}[name]
    assert {len(row["scales"]) for row in one.witness.rows} == {folded}
    assert close(losses["pretrain"], whole_model_losses(tiny.model(), one.evaluation))
    assert all(row["tuning"]["end"] <= row["tuning"]["start"] for row in one.witness.rows)


def test_bfloat16_learns_too(learned):
    one = learned("scales", dtype=torch.bfloat16)
    one.run()
    assert any(row["tuning"]["epoch"] > 0 for row in one.witness.rows)


def test_ignored_linears_and_blocks_stay(llama, learned):
    one = learned("clips", ignored=Ignored(layers=frozenset({"down_proj"})))
    one.run()
    for original, written in zip(llama.model().model.layers, one.written_model(FakeQuant).model.layers, strict=True):
        assert torch.equal(original.mlp.down_proj.weight, written.mlp.down_proj.weight)
        assert not torch.equal(original.mlp.up_proj.weight, written.mlp.up_proj.weight)
    one = learned("clips", ignored=Ignored(blocks=frozenset({1})))
    one.run()
    learned_block, left_alone = one.witness.rows[:2]
    assert learned_block["tuning"]["epoch"] > 0
    assert left_alone["tuning"] is None


def test_a_quantized_cache_is_no_obstacle(learned):
    kv = KvSpec("Naive", Fp8Grid(torch.float8_e4m3fn), PerTensor(), static=True)
    one = learned("clips", kv=kv)
    one.run()
    assert all(row["tuning"]["end"] <= row["tuning"]["start"] for row in one.witness.rows)


def test_what_isnt_a_number_ends_learning_and_the_start_is_kept(learned, monkeypatch):
    from llmc.stream.training import LearningCalls

    plain = LearningCalls.output
    steps = iter(range(10**6))

    def bad(self, batch, weights):
        return plain(self, batch, weights) * (float("nan") if next(steps) == 2 else 1)  # the first of block 0's steps

    monkeypatch.setattr(LearningCalls, "output", bad)
    one = learned("clips")
    losses = one.run().losses
    first, *rest = [row["tuning"] for row in one.witness.rows]
    assert first["stopped"] == "the loss of batch 0 in epoch 1 isn't finite" and first["epoch"] == 0
    assert first["start"] == first["end"]
    assert all(note["stopped"] is None for note in rest) and all(loss.isfinite().all() for loss in losses["fake_quant"])
