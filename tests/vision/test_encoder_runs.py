"""Whole runs that compress the image encoder too: calibrated with images, written, loaded again by Transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import killed_after
from runs import logits, make_tokenizer, settings, with_images, write_samples
from test_encoder_blocks import watched
from test_vision_runs import FAKE, VLLM, digests, reload, source, tensors, text
from tiny_vision import CONFIGS, image_sample, mixed_samples
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

import llmc
from llmc.algorithms import options_types
from llmc.cli import main
from llmc.config import load_config
from llmc.errors import ConfigError, DataError
from llmc.models import find_adapter
from llmc.plan import bits_per_weight
from llmc.prepare import prepare
from llmc.stream.batch import Batch
from llmc.stream.entrance import Entrance

__all__ = ["source", "text"]  # fixtures

CPU = torch.device("cpu")
W4 = {"bit": 4, "symmetric": True, "granularity": "per_channel"}
W8A8 = {
    "weight": {"bit": 8, "symmetric": True, "granularity": "per_channel"},
    "act": {"bit": 8, "symmetric": True, "granularity": "per_token"},
}
NONE: dict[str, Any] = {}


def both(checkpoint: Path, text: Path, out: Path | None, vision: Any, language: Any = None, **changes: Any) -> Any:
    """A configuration with a section for each; without ``language`` those blocks stay as they are."""
    content = settings(checkpoint, text, out, "RTN", **changes)
    content["calib"] |= with_images(text.parent)
    sections = {"vision": vision if "method" in vision else {"method": "RTN", **vision}}
    if language is not None:
        sections["language"] = {"method": language, "weight": W4}
    return {**content, "quant": sections}


@pytest.fixture
def shown(monkeypatch):
    """Samples with images and one without, whatever the family's processor needs."""

    def use(name: str) -> None:
        monkeypatch.setattr("llmc.prepare.calibration", lambda *_: mixed_samples(name))

    return use


@pytest.fixture
def entered(monkeypatch):
    """What the first language block of each stream was given, by the stream's name; and what the second one gets of the
    images besides the hidden state, by the stream's name and `` features``."""
    found: dict[str, list[Tensor]] = {}
    fill = Entrance.fill

    def remember(self: Entrance, name: str, batches: list[Batch], **kwargs: Any) -> None:
        fill(self, name, batches, **kwargs)
        if not self._skeleton.is_encoder:
            found[name] = [batch.clone() for batch in self._store.streams[name].tensors().values()]
            calls = [self._calls[self._key(name, batch)][1] for batch in batches]
            besides = [call.kwargs.get("cross_attention_states", call.added) for call in calls]
            found[f"{name} features"] = [tensor for tensor in besides if tensor is not None]

    monkeypatch.setattr(Entrance, "fill", remember)
    return found


def first_inputs(model: nn.Module, name: str) -> list[Tensor]:
    """The same of a whole model."""
    adapter, found = find_adapter("auto", name), []
    hook = model.get_submodule(adapter.blocks)[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    for batch in mixed_samples(name):
        model(**batch.to(CPU, torch.float32), use_cache=False)
    hook.remove()
    return found


def second_features(model: nn.Module, name: str) -> list[Tensor]:
    """What cross-attention of the second block reads, or what is added in front of it."""
    blocks = model.get_submodule(find_adapter("auto", name).blocks)
    found: list[Tensor] = []
    behind: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] - behind[-1] if name == "qwen3_vl" else kwargs["cross_attention_states"])

    hooks = [
        blocks[0].register_forward_hook(lambda _, __, out: behind.append(out)),
        blocks[1].register_forward_pre_hook(see, with_kwargs=True),
    ]
    for batch in mixed_samples(name):
        if batch.has_images:
            model(**batch.to(CPU, torch.float32), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def lists_of(name: str) -> tuple[str, ...]:
    images = find_adapter("auto", name).images
    assert images is not None
    return images.encoder(CONFIGS[name]).lists


def encoder_linears(model: nn.Module, name: str) -> dict[str, nn.Linear]:
    parts = [part for path in lists_of(name) for part in model.get_submodule(path).named_modules(prefix=path)]
    return {path: module for path, module in parts if isinstance(module, nn.Linear)}


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(*pair) for pair in zip(left, right, strict=True))


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen3_vl", "mllama"])
def test_the_written_encoder_is_the_one_that_the_language_blocks_were_calibrated_behind(
    source, text, tmp_path, shown, entered, name
):
    shown(name)
    language = ["Awq", "GPTQ"]  # which look at the original's and at the compressed model's activations
    result = llmc.compress(both(source(name), text, tmp_path, {"method": "GPTQ", "weight": W4}, language))
    fake, original = reload(tmp_path / FAKE), reload(source(name))
    assert equal(entered["calib.compressed"], first_inputs(fake, name))
    assert equal(entered["calib.original"], first_inputs(original, name))
    if name in ("mllama", "qwen3_vl"):
        for stream, model in (("calib.compressed", fake), ("calib.original", original)):
            pairs = list(zip(entered[f"{stream} features"], second_features(model, name), strict=True))
            assert len(pairs) == 2 and all(torch.allclose(*pair, atol=1e-5) for pair in pairs)
        assert not torch.allclose(*(entered[f"calib.{kind} features"][0] for kind in ("compressed", "original")))
    if name != "mllama":  # whose features are read by cross-attention alone
        assert not equal(entered["calib.compressed"], entered["calib.original"])
    packed = reload(tmp_path / VLLM, quantization_config=CompressedTensorsConfig(dequantize=True))
    sample = image_sample(name).inputs
    assert torch.equal(logits(packed, sample), logits(fake, sample))
    before, after = encoder_linears(original, name), encoder_linears(fake, name)
    for path, linear in after.items():
        assert not torch.equal(linear.weight, before[path].weight), path
        codes = linear.weight / linear.weight.abs().amax(1, keepdim=True)
        assert all(len(row.unique()) <= 16 for row in codes), path
    errors = [row["error"] for row in result.metrics["encoder"]["blocks"]]
    assert errors == pytest.approx(errors_of(original, fake, name), rel=1e-3)


def errors_of(original: nn.Module, compressed: nn.Module, name: str) -> list[float]:
    """``|y_q - y|² / |y|²`` behind each block of the encoder, by hooks on whole models."""
    change: dict[str, float] = {}
    size: dict[str, float] = {}
    for batch in mixed_samples(name):
        if not batch.has_images:
            continue
        outputs = []
        for model in (original, compressed):
            _, found = watched(model, lists_of(name))
            model(**batch.to(CPU, torch.float32), use_cache=False)
            outputs.append(dict(found))
        for path, y in outputs[0].items():
            change[path] = change.get(path, 0.0) + float((outputs[1][path] - y).square().sum())
            size[path] = size.get(path, 0.0) + float(y.square().sum())
    return [change[path] / size[path] for path in change]


@pytest.mark.parametrize(("name", "language"), [("llava", ["Quarot", "GPTQ"]), ("mllama", "GPTQ")])
def test_one_run_writes_what_two_write_one_after_the_other(source, text, tmp_path, shown, name, language):
    """First the encoder, then the language blocks of the model that came out."""
    shown(name)
    vision = {"method": "GPTQ", "weight": W4}
    once, first, then = (tmp_path / part for part in ("once", "first", "then"))
    llmc.compress(both(source(name), text, once, vision, language))
    llmc.compress(both(source(name), text, first, vision))
    content = both(first / FAKE, text, then, vision, language)
    content["quant"] = content["quant"]["language"]
    llmc.compress(content)
    left, right = tensors(once / FAKE), tensors(then / FAKE)
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[key]) for key, tensor in left.items())


@pytest.mark.parametrize("name", ["qwen2_5_vl"])
def test_rounded_activations_are_part_of_the_compressed_encoder(source, text, tmp_path, shown, entered, name):
    """The whole model of the written weights, its encoder's inputs rounded by a formula of its own."""
    shown(name)
    llmc.compress(both(source(name), text, tmp_path, {"method": "SmoothQuant", **W8A8}, "GPTQ"))
    fake = reload(tmp_path / FAKE)
    unrounded = first_inputs(fake, name)

    def rounded(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        scale = (args[0].abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return (args[0] / scale).round().clamp(-128, 127) * scale

    for linear in encoder_linears(fake, name).values():
        linear.register_forward_pre_hook(rounded)
    for found, expected, plain in zip(entered["calib.compressed"], first_inputs(fake, name), unrounded, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
        assert not found.shape[1] > 20 or not torch.allclose(found, plain, atol=1e-5)
    config = json.loads((tmp_path / VLLM / "config.json").read_text())["quantization_config"]
    acts = {
        target: (group["weights"]["num_bits"], group["input_activations"] is not None)
        for group in config["config_groups"].values()
        for target in group["targets"]
    }
    linears = encoder_linears(fake, name)
    assert {acts[path] for path in linears} == {(8, True)}
    assert {kind for path, kind in acts.items() if ".language_model." in path} == {(4, False)}


@pytest.mark.parametrize("name", ["qwen2_vl"])
def test_gptq_leaves_a_smaller_error_of_the_encoder_than_rounding(source, text, shown, name):
    shown(name)
    weight = {**W4, "bit": 3}
    errors = {}
    for method in ("RTN", "GPTQ", ["Awq", "RTN"]):
        vision = {"method": method, "weight": weight}
        rows = llmc.compress(both(source(name), text, None, vision)).metrics["encoder"]["blocks"]
        errors[str(method)] = rows[-1]["error"]
        assert [row["unit"] for row in rows] == [f"{lists_of(name)[0]}.{index}" for index in range(len(rows))]
    assert 0 < errors["GPTQ"] < errors["RTN"]
    assert 0 < errors["['Awq', 'RTN']"] < errors["RTN"]


@pytest.mark.parametrize("name", ["gemma3", "internvl"])
def test_the_encoder_alone_leaves_the_language_blocks_as_they_were(source, text, tmp_path, name):
    """Without calibration data, where a method needs none."""
    content = both(source(name), text, tmp_path, {"method": "RTN", "weight": W4})
    result = llmc.compress({key: value for key, value in content.items() if key != "calib"})
    assert {row["error"] for row in result.metrics["encoder"]["blocks"]} == {None}
    original, written = tensors(source(name)), tensors(tmp_path / FAKE)
    assert original.keys() == written.keys()
    changed = {key.removesuffix(".weight") for key in original if not torch.equal(original[key], written[key])}
    model = reload(tmp_path / FAKE)
    assert len(changed) == len(encoder_linears(model, name))
    assert not any("language" in key for key in changed)
    config = json.loads((tmp_path / VLLM / "config.json").read_text())["quantization_config"]
    others = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    others -= set(encoder_linears(model, name))
    assert set(config["ignore"]) >= others and not set(config["ignore"]) & set(encoder_linears(model, name))
    packed = reload(tmp_path / VLLM, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(logits(packed, image_sample(name).inputs), logits(model, image_sample(name).inputs))
    assert main(["verify", str(tmp_path / VLLM), "--against", str(tmp_path / FAKE)]) == 0


def test_transformers_runs_both_schemes_as_they_are_stored(source, text, tmp_path, shown):
    """Packed, each part by the group that names it: 8 bits here, 4 there."""
    shown("llava")
    llmc.compress(both(source("llava"), text, tmp_path, {"weight": {**W4, "bit": 8}}, "RTN"))
    auto: Any = AutoModelForImageTextToText
    # In the dtype of the scales, in which the products were evaluated.
    packed, fake = (auto.from_pretrained(tmp_path / part, dtype=torch.bfloat16) for part in (VLLM, FAKE))
    modules = packed.named_modules()
    bits = {path: m.quantization_scheme.weights.num_bits for path, m in modules if hasattr(m, "quantization_scheme")}
    encoder = set(encoder_linears(fake, "llava"))
    assert {path for path, count in bits.items() if count == 8} == encoder
    assert {path for path, count in bits.items() if count == 4} == {
        path
        for path, module in fake.named_modules()
        if isinstance(module, nn.Linear) and ".language_model.layers." in path
    }
    sample = image_sample("llava").inputs
    assert torch.equal(logits(packed, sample), logits(fake, sample))


@pytest.mark.parametrize("name", ["mllama"])
def test_killed_and_resumed_the_encoder_has_the_same_bytes(source, text, tmp_path, shown, name):
    shown(name)
    vision = {"method": ["Awq", "GPTQ"], "weight": W4}
    once = {"base": {"checkpoint_every": 1}, "save": {"save_fake": False}}
    calm, killed = (both(source(name), text, tmp_path / part, vision, "GPTQ", **once) for part in ("calm", "killed"))
    llmc.compress(calm)
    # Behind the first block, behind its activations, into the second list, into the language blocks.
    assert all(killed_after((1, 1, 2, 2), name, killed))
    llmc.compress(killed)
    assert digests(tmp_path / "calm") == digests(tmp_path / "killed") != {}
    assert not (tmp_path / "killed" / ".llmc").exists()


def test_the_plan_names_every_linear_with_its_scheme(source, text, shown):
    shown("llava")
    named = "model.vision_tower.encoder.layers.1.mlp.fc1"
    content = both(source("llava"), text, None, {"weight": {**W4, "bit": 3}}, "RTN", save=NONE)
    content["ignored_layers"] = {"special_names": [named, "model.language_model.layers.0.mlp.up_proj"]}
    content["quant"]["vision"]["mix_bits"] = {
        "wide": {"layer_name": ["fc2#0"], "do_quant": True, "weight": {**W4, "bit": 8}}
    }
    content["eval"] = {"eval_pos": []} | {"name": "text", "path": str(text), "seq_len": 16}
    prepared = prepare(load_config(content, (), options_types()))
    schemes = {layer.module: layer.describe() for layer in prepared.layers}
    found = {path: schemes[path] for path in schemes if path.startswith(lists_of("llava"))}
    assert len(found) == 4 * 6
    assert found.pop(named) == ""
    assert found.pop("model.vision_tower.encoder.layers.0.mlp.fc2").startswith("W8")
    assert all(scheme.startswith("W3 channel") for scheme in found.values())
    kept = [path for path, scheme in schemes.items() if not scheme]
    assert {named, "model.language_model.layers.0.mlp.up_proj"} < set(kept)
    assert all("projector" in path or path in (named, "lm_head") or "up_proj" in path for path in kept)


def test_the_files_for_encoders_plan_one(source, text, shown):
    shown("qwen2_5_vl")
    files = sorted((Path(__file__).parents[2] / "configs" / "vision").glob("*.yml"))
    for file in files:
        overrides = [f"model.path={source('qwen2_5_vl')}", f"calib.path={text.parent}", "save={}", "base.device=cpu"]
        overrides += ["eval.name=text", f"eval.path={text}", "eval.download=False", "eval.seq_len=16"]
        overrides += ["quant.language.weight.group_size=32"]  # its widths are small
        loaded = load_config(file, overrides, options_types())
        assert loaded.warnings == ()
        plan = prepare(loaded).encoder
        assert plan is not None
        assert {layer.describe() for layer in plan.layers} == {"W8 channel sym, A8 token sym"}
    assert files


def test_bits_per_weight_count_the_encoder(source, text, shown):
    shown("llava")
    prepared = prepare(load_config(both(source("llava"), text, None, {"weight": W4}), (), options_types()))
    rows, weights = 4 * (4 * 32 + 48 + 32), 4 * (4 * 32 * 32 + 2 * 32 * 48)
    assert bits_per_weight(prepared.layers) == pytest.approx((4 * weights + 16 * rows) / weights)


def test_a_run_with_an_encoder_is_exported_again(source, text, tmp_path, shown):
    shown("qwen2_5_vl")
    run, again = tmp_path / "run", tmp_path / "again"
    llmc.compress(both(source("qwen2_5_vl"), text, run, {"method": "GPTQ", "weight": W4}))
    shutil.copytree(run, again)
    shutil.rmtree(again / FAKE)
    metrics = json.loads((again / "metrics.json").read_text())
    del metrics["outputs"]["save_fake"]
    (again / "metrics.json").write_text(json.dumps(metrics))
    assert main(["export", "--from", str(again), "--to", "fake"]) == 0
    assert digests(run) == digests(again) != {}


def test_an_export_of_products_alone_has_no_codes_to_go_on_with(source, text, tmp_path, shown, capsys):
    shown("llava")
    llmc.compress(both(source("llava"), text, tmp_path, {"weight": W4}, save={"save_vllm": False}))
    assert main(["export", "--from", str(tmp_path), "--to", "vllm"]) == 2
    assert "holds no codes" in capsys.readouterr().err


ACT_STATIC = {"bit": 8, "symmetric": True, "granularity": "per_tensor", "static": True}
TEXT = {"name": "text", "preproc": "sequential", "seq_len": 9}
GROUPS = {**W4, "granularity": "per_group", "group_size": 32}
KV8 = {"method": "Naive", "bit": 8, "symmetric": True, "granularity": "per_token"}


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ({"method": "Quarot", "weight": W4}, {}, r"quant.vision: method \['Quarot'\] isn't for an image encoder"),
        ({"method": "OmniQuant", "weight": W4}, {}, "isn't for an image encoder; these are: RTN, GPTQ, Awq"),
        ({"weight": W4, "kvcache": KV8}, {}, "quant.vision: kvcache: an encoder has no KV cache"),
        ({"weight": W8A8["weight"], "act": ACT_STATIC}, {}, "quant.vision: act: static scales"),
        ({"weight": W4, "special": {"percdampp": 1}}, {}, "quant.vision.special.percdampp"),
        ({"weight": {**W4, "bits": 4}}, {}, r"quant.vision.weight.bits.*did you mean 'bit'"),
        ({"method": "GPTQ", "weight": W4}, {"calib": TEXT}, "quant.vision: .*'GPTQ'.* is calibrated with images"),
        ({"weight": W4}, {"save": {"save_trans": True}}, "save_trans: the encoder before"),
        ({"weight": GROUPS}, {}, r"quant.vision.weight.group_size: 32 doesn't divide the 48 input channels"),
        ({"method": "RTN"}, {}, "quant.vision.weight is missing"),
        ({"weight": {**W4, "bit": 16}}, {}, "quant.vision.weight"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_an_encoder_is_refused_before_a_weight_is_read(
    source, text, tmp_path, monkeypatch, section, changes, said
):
    monkeypatch.setattr("llmc.stream.source.read_tensor", lambda entry: pytest.fail(f"{entry.name} was read"))
    content = both(source("llava"), text, tmp_path / "out", section, "RTN")
    for key, values in changes.items():
        content[key] = {**content[key], **values}
    with pytest.raises(ConfigError, match=said):
        llmc.compress(content)
    assert not (tmp_path / "out").exists()


def test_samples_without_an_image_do_not_calibrate_an_encoder(source, text, tmp_path):
    entries = [{**entry, "image": ""} for entry in write_samples(tmp_path / "questions")]
    (tmp_path / "questions" / "samples.json").write_text(json.dumps(entries))
    content = both(source("llava"), text, None, {"method": "GPTQ", "weight": W4})
    content["calib"] |= {"path": str(tmp_path / "questions")}
    with pytest.raises(DataError, match=r"no sample has an image, and quant.vision is calibrated with images"):
        llmc.compress(content)


def test_a_family_without_an_encoder_says_so(text, tmp_path):
    config = LlamaConfig(
        vocab_size=220, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    content = both(tmp_path / "llama", text, None, {"weight": W4})
    with pytest.raises(ConfigError, match=r"quant.vision: Llama reads text alone, it has no image encoder"):
        llmc.compress(content)


def test_a_section_for_each_part_reads_the_same_however_it_is_written():
    vision, language = {"method": "RTN", "weight": W4}, {"method": "GPTQ", "weight": W4}
    model, calib = {"path": "m"}, {"name": "custom_mm", "path": "q"}
    forms = [
        {"vision": vision, "language": language},
        {"language": language, "vision": vision},
        {**language, "vision": vision},
    ]
    loaded = [load_config({"model": model, "calib": calib, "quant": form}, (), options_types()) for form in forms]
    assert loaded[0].resolved == loaded[1].resolved == loaded[2].resolved
    again = load_config(loaded[0].resolved, (), options_types())
    assert again.resolved == loaded[0].resolved
    quant = again.config.quant
    assert quant is not None and quant.vision is not None
    assert (quant.method, quant.vision.method) == (("GPTQ",), ("RTN",))
    alone = load_config({"model": model, "quant": {"vision": vision}}, (), options_types())
    assert alone.config.quant is not None and alone.config.quant.method == ()
    assert load_config(alone.resolved, (), options_types()).resolved == alone.resolved
    off = load_config({"model": model, "quant": {**language, "vision": None}, "calib": calib}, (), options_types())
    assert off.config.quant is not None and off.config.quant.vision is None


def test_each_pass_reads_what_it_needs_once_as_the_plan_says(source, text, shown, vision):
    """Two lists of blocks: two passes over what is in front of them, and the one over the language model."""
    shown("mllama")
    loaded = load_config(both(source("mllama"), text, None, {"weight": W4}), (), options_types())
    prepared = prepare(loaded)
    tiny = vision("mllama")
    skeleton, entries = tiny.skeleton(), tiny.entries
    blocks = [name for name in skeleton.units["embed"] if "transformer.layers." in name]
    front = [name for name in skeleton.units["embed"] if name not in blocks]
    expected = sum(entry.nbytes for entry in entries.values()) + sum(entries[name].nbytes for name in blocks)
    expected += 2 * sum(entries[name].nbytes for name in front)
    assert prepared.estimate.read == expected
    assert llmc.compress(loaded).metrics["bytes_read"] == expected


def test_nothing_is_shown_of_an_encoder_that_stays(source, text):
    assert llmc.compress(settings(source("llava"), text, None, "RTN")).metrics["encoder"] is None
