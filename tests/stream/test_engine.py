"""One pass: both models' perplexities are those of transformers, and an interrupted pass ends with the same bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmc.algorithms import Frame, Ignored, Recipe, make_recipe
from llmc.algorithms.gptq import GPTQOptions
from llmc.errors import CheckpointError, RunError
from llmc.eval.measure import Watch
from llmc.eval.perplexity import CrossEntropy, mean_losses, perplexity
from llmc.export import read_config
from llmc.export.dense import FakeQuant, Transformed
from llmc.export.vllm import VLLM
from llmc.models import residual_of
from llmc.quant import ActSpec, Fp8Grid, IntGrid, KvSpec, PerGroup, PerTensor, QuantSpec
from llmc.stream import engine as engine_module
from llmc.stream.activations import ActivationStore
from llmc.stream.batch import Batch
from llmc.stream.engine import Batches, Engine, EngineOptions
from llmc.stream.files import write_json
from llmc.stream.journal import Journal
from llmc.stream.sink import Sink

METHODS = ["RTN", "GPTQ", "Awq", "Quarot+GPTQ"]
SPEC = QuantSpec(4, symmetric=False, granularity=PerGroup(32), scale_dtype=torch.bfloat16)
BLOCKS = 4
UNITS = ["embed", *(f"block-{index}" for index in range(BLOCKS)), "head"]


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Witness:
    """A listener that notes the progress, and kills the run behind block ``fatal``."""

    fatal: int | None = None
    done: int | None = None
    blocks: list[int] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def started(self, blocks: int, done: int) -> None:
        assert blocks == BLOCKS
        self.done = done

    def block(self, index: int, row: dict[str, Any]) -> None:
        self.blocks.append(index)
        self.rows.append(row)
        if index == self.fatal:
            raise Killed

    def phase(self, text: str) -> None:
        pass


@dataclass
class Seen:
    """What a pass measured, and read.

    Attributes:
        losses: for each evaluated state, one ``[batch, tokens - 1]`` cross entropy per evaluation batch.
        decoded: the same of the batches that were decoded token by token.
        bytes_read: of the checkpoint.
    """

    losses: dict[str, list[Tensor]]
    decoded: dict[str, list[Tensor]]
    bytes_read: int


@dataclass
class Pass:
    """A run over a folder: the same arguments over the same folder go on where it was killed."""

    tiny: Any
    folder: Path
    calib: list[Tensor]
    evaluation: list[Tensor]
    method: str = "RTN"  # or several, joined by +
    options: dict[str, Any] = field(default_factory=dict)
    quant_out: bool | None = None
    forward: str = "auto"
    checkpoint_every: int = 2
    budget: int | None = None
    positions: tuple[str, ...] = ("pretrain", "transformed", "fake_quant")
    formats: tuple[type, ...] = (VLLM, FakeQuant, Transformed)
    ignored: Ignored = field(default_factory=Ignored)
    spec: QuantSpec = SPEC
    act: ActSpec | None = None
    kv: KvSpec | None = None
    decoded: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    witness: Witness = field(default_factory=Witness)

    def recipe(self) -> Recipe:
        methods, quant_out = self.method.split("+"), self.quant_out
        return make_recipe(
            methods, self.options, self.spec, self.ignored, quant_out=quant_out, act=self.act, kv=self.kv
        )

    def sinks(self) -> list[Sink]:
        made = []
        for kind in self.formats:
            exporter = kind(self.spec, torch.bfloat16, torch.float32, self.act, self.kv, layout=self.tiny.layout)
            folder = self.folder / kind.folder
            folder.mkdir(parents=True, exist_ok=True)
            made.append(Sink(folder, exporter, UNITS, lambda path, record: None))
        return made

    def run(self, fatal: int | None = None) -> Seen:
        state = self.folder / "state"
        state.mkdir(parents=True, exist_ok=True)
        self.witness = Witness(fatal)
        skeleton = self.tiny.skeleton(self.dtype)
        source, sinks = self.tiny.source(skeleton), self.sinks()
        recipe = self.recipe()
        config, subsets, heads = self.tiny.config, self.tiny.block_subsets, self.tiny.adapter.heads(self.tiny.config)
        frame = None
        if recipe.at_load:
            declared = residual_of(self.tiny.adapter, config, subsets[0])
            frame = Frame(subsets, heads, declared, config.hidden_size, seed=0, ffn=128)
        texts = list(map(Batch, self.evaluation))
        measures = [CrossEntropy(), CrossEntropy()]
        watches = [
            Watch(measure, range(len(texts)), frozenset(states))
            for measure, states in zip(measures, (self.positions, self.decoded), strict=True)
        ]
        try:
            outcome = Engine(
                skeleton=skeleton,
                source=source,
                recipe=recipe,
                subsets=subsets,
                heads=heads,
                calib=Batches(list(map(Batch, self.calib))),
                evaluation=Batches(texts, watches[:1]),
                sinks=[sink for sink in sinks if not sink.format.transformed_only],
                transformed=next((sink for sink in sinks if sink.format.transformed_only), None),
                store=ActivationStore(state, self.budget),
                journal=Journal(state / "journal.jsonl"),
                device=torch.device("cpu"),
                options=EngineOptions(forward=self.forward, checkpoint_every=self.checkpoint_every),
                listener=self.witness,
                frame=frame,
                decoding=Batches(texts, watches[1:]),
            ).run()
        finally:
            source.close()
        losses = [
            {state: measure.losses(state) for state in states}
            for measure, states in zip(measures, (self.positions, self.decoded), strict=True)
        ]
        return Seen(*losses, outcome.bytes_read)

    def shards(self) -> dict[str, bytes]:
        files = sorted(self.folder.glob("*/model-*.safetensors"))
        return {str(file.relative_to(self.folder)): file.read_bytes() for file in files}

    def written_model(self, kind: type) -> nn.Module:
        """The written folder as transformers loads it."""
        exporter = kind(self.spec, torch.bfloat16, torch.float32, self.act)
        folder = self.folder / kind.folder
        sink = next(sink for sink in self.sinks() if isinstance(sink.format, kind))
        sink.write_index([row for row in Journal(self.folder / "state/journal.jsonl").rows if row["kind"] == "unit"])
        write_json(folder / "config.json", exporter.config(read_config(self.tiny.folder), []))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(engine_module, "give_back_memory", lambda: None)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def passes(tmp_path, tokens) -> Callable[..., Pass]:
    """Makes passes over folders of their own, with two batches for calibration and two windows for evaluation."""
    calib = [tokens(2, 16, seed=1), tokens(1, 16, seed=2)]
    evaluation = [tokens(1, 24, seed=3), tokens(1, 24, seed=4)]
    count = iter(range(10**6))
    return lambda tiny, **changes: Pass(tiny, tmp_path / str(next(count)), calib, evaluation, **changes)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, tuple[dict[str, bytes], Seen]]:
    """Shards and outcome of a whole pass, by method."""
    return {}


@pytest.fixture
def calm(llama, passes, undisturbed) -> Callable[[str], tuple[dict[str, bytes], Seen]]:
    """Shards and outcome of a method's whole pass over the tiny llama."""

    def get(method: str) -> tuple[dict[str, bytes], Seen]:
        if method not in undisturbed:
            one = passes(llama, method=method)
            outcome = one.run()
            undisturbed[method] = one.shards(), outcome
        return undisturbed[method]

    return get


@torch.no_grad()
def whole_model_losses(model: nn.Module, windows: list[Tensor]) -> list[Tensor]:
    losses = []
    for ids in windows:
        logits = model(input_ids=ids, use_cache=False).logits
        losses.append(nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"))
    return losses


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def close(left: list[Tensor], right: list[Tensor], tolerance: float = 1e-6) -> bool:
    return perplexity(mean_losses(left)) == pytest.approx(perplexity(mean_losses(right)), rel=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_perplexities_are_those_of_transformers(llama, passes, method):
    one = passes(llama, method=method)
    losses = one.run().losses
    assert close(losses["pretrain"], whole_model_losses(llama.model(), one.evaluation))
    assert close(losses["fake_quant"], whole_model_losses(one.written_model(FakeQuant), one.evaluation))
    assert close(losses["transformed"], whole_model_losses(one.written_model(Transformed), one.evaluation))
    assert not close(losses["pretrain"], losses["fake_quant"], 1e-4)


def test_perplexities_are_those_of_transformers_for_every_family(tiny, passes):
    one = passes(tiny, method="GPTQ", formats=(FakeQuant,), positions=("pretrain", "fake_quant"))
    losses = one.run().losses
    assert close(losses["pretrain"], whole_model_losses(tiny.model(), one.evaluation))
    assert close(losses["fake_quant"], whole_model_losses(one.written_model(FakeQuant), one.evaluation))


def test_transforms_preserve_the_function(llama, passes):
    for method in ("Awq", "Quarot", "Quarot+Awq"):
        losses = passes(llama, method=method).run().losses
        assert not equal(losses["transformed"], losses["pretrain"])
        assert close(losses["transformed"], losses["pretrain"], 5e-3)


@pytest.mark.parametrize("forward", ["staged", "replay"])
@pytest.mark.parametrize("method", METHODS)
def test_staged_and_replayed_forwards_write_the_same_bytes(llama, passes, calm, method, forward):
    one = passes(llama, method=method, forward=forward)
    losses = one.run().losses
    shards, expected = calm(method)
    assert one.shards() == shards
    assert len(shards) == 3 * len(UNITS)
    assert all(equal(losses[position], expected.losses[position]) for position in one.positions)


def test_activations_in_mapped_files_change_nothing(llama, passes, calm):
    mapped = passes(llama, method="GPTQ", budget=0)
    mapped.run()
    assert mapped.shards() == calm("GPTQ")[0]
    assert list((mapped.folder / "state/mapped").iterdir())


@pytest.mark.parametrize("checkpoint_every", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_killed_behind_any_block_it_ends_with_the_same_bytes(llama, passes, calm, method, checkpoint_every):
    shards, expected = calm(method)
    for fatal in range(BLOCKS):
        killed = passes(llama, method=method, checkpoint_every=checkpoint_every)
        with pytest.raises(Killed):
            killed.run(fatal)
        resumed = killed.run()
        assert killed.witness.done == fatal + 1
        assert killed.witness.blocks == list(range(fatal // checkpoint_every * checkpoint_every, BLOCKS))
        assert killed.shards() == shards
        assert all(equal(resumed.losses[position], expected.losses[position]) for position in killed.positions)


@pytest.mark.parametrize(
    ("method", "quant_out"),
    [
        *[("Awq+GPTQ", None), ("Awq+GPTQ", False), ("Awq", True), ("GPTQ", False)],
        *[("Quarot", None), ("Quarot+Awq", None), ("Quarot+GPTQ", False), ("Quarot+Awq+GPTQ", None)],
    ],
)
def test_whichever_streams_calibrate_a_killed_and_replayed_run_writes_the_same_bytes(llama, passes, method, quant_out):
    make = partial(passes, llama, method=method, quant_out=quant_out, formats=(VLLM,), positions=("fake_quant",))
    calm, killed = make(), make(forward="replay", checkpoint_every=3)
    calm.run()
    for fatal in (1, 2):
        with pytest.raises(Killed):
            killed.run(fatal)
    killed.run()
    assert killed.shards() == calm.shards()


def test_what_is_not_quantized_is_rounded_before_anything_runs_a_rotated_block(llama, passes):
    """Here the original's stream is propagated behind the quantizer's own rounding, in a resumed run before it."""
    options = {"GPTQ": GPTQOptions(true_sequential=False)}
    ignored = Ignored(layers=frozenset({"v_proj"}))
    make = partial(passes, llama, method="Quarot+GPTQ", quant_out=False, options=options, ignored=ignored)
    calm, killed = make(), make(checkpoint_every=3)
    calm.run()
    with pytest.raises(Killed):
        killed.run(1)
    killed.run()
    assert killed.shards() == calm.shards()


def test_killed_before_a_sync_it_ends_with_the_same_bytes(llama, passes, monkeypatch):
    make = partial(passes, llama, formats=(VLLM,), positions=("fake_quant",), checkpoint_every=1)
    calm, syncs = make(), []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", syncs.append)
        expected = calm.run()
    # A block syncs shard, folder, journal, checkpoint, folder, journal: every fifth meets each kind in turn.
    for fatal in range(0, len(syncs), 5):
        left = iter(range(fatal))

        def crash(handle: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Killed

        killed = make()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "fsync", crash)
            killed.run()
        resumed = killed.run()
        assert killed.shards() == calm.shards(), fatal
        assert equal(resumed.losses["fake_quant"], expected.losses["fake_quant"]), fatal


def test_killed_again_and_again_it_ends_with_the_same_bytes(llama, passes, calm):
    killed = passes(llama, method="GPTQ", checkpoint_every=1)
    for fatal in range(BLOCKS):
        with pytest.raises(Killed):
            killed.run(fatal)
    killed.run()
    assert killed.shards() == calm("GPTQ")[0]


def test_a_finished_pass_run_again_changes_nothing(llama, passes):
    one = passes(llama, method="Awq")
    first, before = one.run(), one.shards()
    again = one.run()
    assert one.shards() == before
    assert all(equal(again.losses[position], first.losses[position]) for position in one.positions)


def test_a_resumed_run_refuses_a_shard_that_was_changed_meanwhile(llama, passes):
    one = passes(llama, method="GPTQ", checkpoint_every=10)
    with pytest.raises(Killed):
        one.run(fatal=1)
    shard = one.sinks()[0].shard("block-0")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(RunError, match="isn't what the interrupted run wrote"):
        one.run()


def test_one_checkpoint_of_the_activations_is_kept(llama, passes):
    one = passes(llama, method="GPTQ", checkpoint_every=1)
    one.run()
    assert [file.name for file in (one.folder / "state").glob("activations*")] == ["activations-2.safetensors"]


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_read_once(llama, passes, method):
    outcome = passes(llama, method=method).run()
    assert outcome.bytes_read == sum(entry.nbytes for entry in llama.entries.values())


def test_nothing_is_run_that_nobody_reads(llama, passes):
    one = passes(llama, method="RTN", positions=(), formats=(VLLM,))
    assert one.run().losses == {}
    assert one.witness.rows[0]["error"] is None
    assert list((one.folder / "state").iterdir()) == [one.folder / "state/journal.jsonl"]


def test_ignored_linears_keep_their_weights(llama, passes):
    one = passes(llama, method="GPTQ", formats=(FakeQuant,), ignored=Ignored(layers=frozenset({"v_proj"})))
    one.run()
    original, written = llama.model(), one.written_model(FakeQuant).state_dict()
    changed = {name for name, tensor in original.state_dict().items() if not torch.equal(tensor, written[name])}
    linears = {name for name, module in original.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert changed == {f"{name}.weight" for name in linears if "v_proj" not in name}


def test_the_journal_tells_each_layers_error(llama, passes):
    one = passes(llama, method="GPTQ")
    one.run()
    for row in one.witness.rows:
        assert row["layers"].keys() == {name for subset in llama.subsets for name in subset.linears}
        assert all(0 < note["error"] < 0.2 and note["fallback"] is None for note in row["layers"].values())
        assert 0 < row["error"] < 1


KIVI = KvSpec("Kivi", IntGrid(2, False, offset=True), PerGroup(4), residual=4)
FP8 = KvSpec("Naive", Fp8Grid(torch.float8_e4m3fn), PerTensor(), static=True)


@pytest.mark.parametrize("kv", [KIVI, FP8], ids=KvSpec.describe)
@pytest.mark.parametrize("method", ["RTN", "GPTQ", "Awq+GPTQ"])
def test_with_a_quantized_cache_a_killed_and_replayed_run_ends_the_same(llama, passes, method, kv):
    positions = ("pretrain", "transformed", "fake_quant", "fake_quant_wo_kv")
    make = partial(passes, llama, method=method, kv=kv, positions=positions, decoded=("pretrain", "fake_quant"))
    calm, killed = make(), make(forward="replay", checkpoint_every=3)
    expected = calm.run()
    for fatal in (1, 2):
        with pytest.raises(Killed):
            killed.run(fatal)
    resumed = killed.run()
    assert killed.shards() == calm.shards()
    assert all(equal(resumed.losses[position], expected.losses[position]) for position in positions)
    assert all(equal(resumed.decoded[position], expected.decoded[position]) for position in expected.decoded)
    assert close(expected.decoded["pretrain"], expected.losses["pretrain"])
    assert not close(expected.losses["fake_quant"], expected.losses["fake_quant_wo_kv"], 1e-5)
    plain = make(kv=None, positions=("fake_quant",), decoded=())
    assert (plain.run().losses.keys(), plain.shards() == calm.shards()) == (
        {"fake_quant"},
        method == "RTN" and kv == KIVI,
    )


def damaged(tiny, folder: Path, name: str, value: float) -> Any:
    entry = tiny.entries[name]
    copy = shutil.copytree(tiny.folder, folder)
    with (copy / entry.file.name).open("r+b") as file:
        file.seek(entry.offset)
        file.write(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes())
    return type(tiny)(tiny.name, copy)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite_stops_the_run_and_is_named(llama, passes, tmp_path, name):
    with pytest.raises(CheckpointError, match=f"{name}: 1 of"):
        passes(damaged(llama, tmp_path / "bad", name, float("nan"))).run()


def test_an_output_that_is_not_finite_stops_the_run_behind_its_block(llama, passes, tmp_path):
    bad = damaged(llama, tmp_path / "bad", "model.layers.1.input_layernorm.weight", 3e38)
    one = passes(bad, positions=("pretrain",))
    with pytest.raises(RunError, match="the output of block 1 isn't finite"):
        one.run()
    assert one.witness.blocks == [0]
