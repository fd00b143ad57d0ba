"""Whole runs: calibrated with images or text, written, loaded again by Transformers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import killed_after
from runs import logits, make_tokenizer, settings, with_images, words, write_processor, write_samples
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_vision import CONFIGS, SEVEN, image_sample, mixed_samples
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils.quantization_config import CompressedTensorsConfig

import llmc
from llmc.algorithms import options_types
from llmc.cli import main
from llmc.config import load_config
from llmc.errors import ConfigError, DataError, ExportError, ModelError
from llmc.prepare import prepare
from llmc.run import _fingerprint

VLLM, FAKE = "vllm_quant_model", "fake_quant_model"
EVAL = {"name": "text", "seq_len": 16, "num_chunks": 2, "bs": 1, "eval_pos": ["pretrain", "fake_quant"]}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(words(400, seed=1))
    return file


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    write_samples(folder)
    return folder


@pytest.fixture(scope="session")
def source(vision, tmp_path_factory):
    """A tiny checkpoint with its processor. Copy it before you change it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = Path(shutil.copytree(vision(name).folder, tmp_path_factory.mktemp("source") / name))
            write_processor(name, made[name])
        return made[name]

    return get


def reload(folder: Path, **options: Any):
    auto: Any = AutoModelForImageTextToText
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return found


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and "_model/" in str(file))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def check_written(checkpoint: Path, out: Path, name: str) -> None:
    """What was compressed loads and computes the same in both formats; everything else is the original's."""
    sample = image_sample(name).inputs
    packed = reload(out / VLLM, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(logits(packed, sample), logits(reload(out / FAKE), sample))
    original, written = tensors(checkpoint), tensors(out / FAKE)
    assert original.keys() == written.keys()
    changed = {key for key in original if not torch.equal(original[key].float(), written[key].float())}
    assert changed and all(".layers." in key and "vision" not in key for key in changed)
    stored = {key.rpartition(".")[0] for key in tensors(out / VLLM)}
    assert {key.rpartition(".")[0] for key in original} == stored
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "model.safetensors.index.json"):
            assert (out / VLLM / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", CONFIGS)
def test_calibrated_with_text_it_loads_again(source, text, tmp_path, name):
    out = tmp_path / "out"
    result = llmc.compress(settings(source(name), text, out, "GPTQ", eval={**EVAL, "path": str(text)}))
    check_written(source(name), out, name)
    original, compressed = result.perplexities
    assert 1 < original.value < 10_000 and 1 < compressed.value < 10_000
    assert "AutoModelForImageTextToText" in result.outputs["save_fake"]["serve"]
    notes = {row["unit"]: {note["fallback"] for note in row["layers"].values()} for row in result.metrics["blocks"]}
    unseen = {unit: said for unit, said in notes.items() if said != {None}}
    why = {"no calibration token reached it: rounded to nearest"}
    assert unseen == ({"block-1": why, "block-2": why} if name == "mllama" else {})
    sources = {
        (note["fallback"] is None, note["error_of"])
        for row in result.metrics["blocks"]
        for note in row["layers"].values()
    }
    assert sources == {(True, "calibration"), *([(False, "weights")] if name == "mllama" else [])}


@pytest.mark.parametrize("name", SEVEN)
@pytest.mark.parametrize("method", [["Awq", "RTN"], ["SmoothQuant", "RTN"]])
def test_every_method_runs_with_text(source, text, name, method):
    assert llmc.compress(settings(source(name), text, None, method)).metrics["blocks"]


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("method", ["RTN", "GPTQ", "Awq", "SmoothQuant"])
def test_calibrated_with_images_it_loads_again(source, questions, text, tmp_path, name, method):
    out = tmp_path / "out"
    result = llmc.compress(settings(source(name), text, out, method, calib=with_images(questions)))
    check_written(source(name), out, name)
    assert not any(note["fallback"] for row in result.metrics["blocks"] for note in row["layers"].values())


@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_are_those_of_the_whole_model_on_images_and_text(vision, source, text, monkeypatch, name):
    """SmoothQuant's scales, from what hooks on Transformers' own model see: positions, masks, cross-attention and what
    is added between blocks included."""
    monkeypatch.setattr("llmc.prepare.calibration", lambda *_: mixed_samples(name))
    found = llmc.compress(settings(source(name), text, None, "SmoothQuant")).metrics["blocks"]
    tiny, largest = vision(name), {}
    model = tiny.model()
    blocks, config = model.get_submodule(tiny.adapter.blocks), tiny.config.get_text_config()

    def see(path: str, tensor: torch.Tensor) -> None:
        amax = tensor.abs().flatten(0, -2).amax(0)
        largest[path] = torch.maximum(largest[path], amax) if path in largest else amax

    for path, module in blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, path=path: see(path, args[0]))
    for batch in mixed_samples(name):
        model(**batch.to(torch.device("cpu"), torch.float32), use_cache=False)
    for index, (block, row) in enumerate(zip(blocks, found, strict=True)):
        subsets = [one for one in tiny.adapter.subsets(config, block) if one.prev and "norm" in one.prev]
        assert [subset.key for subset in subsets] == list(row["scales"])
        for subset in subsets:
            weights = torch.stack([block.get_submodule(one).weight.abs().amax(0) for one in subset.linears]).amax(0)
            scale = (largest[f"{index}.{subset.linears[0]}"] / weights).sqrt()
            expected = [float(scale.min()), float(scale.max())]
            assert row["scales"][subset.key] == pytest.approx(expected, rel=1e-4), (index, subset.key)


@pytest.mark.parametrize("name", ["qwen3_vl"])
def test_killed_and_resumed_it_writes_the_same_bytes(source, text, tmp_path, monkeypatch, name):
    monkeypatch.setattr("llmc.prepare.calibration", lambda *_: mixed_samples(name))
    once = {"base": {"checkpoint_every": 1}, "save": {"save_fake": False}}
    calm, killed = (settings(source(name), text, tmp_path / part, "GPTQ", **once) for part in ("calm", "killed"))
    llmc.compress(calm)
    assert all(killed_after((1, 2, 2), name, killed))  # behind the embedding, behind a block and its activations
    llmc.compress(killed)
    assert digests(tmp_path / "calm") == digests(tmp_path / "killed") != {}


def test_the_encoder_is_left_alone_by_name(source, text, tmp_path):
    """The names that a loader looks for are those of the model or of the checkpoint: both are there."""
    # Transformers' packed Linears know no zero points.
    weight = {"bit": 4, "symmetric": True, "granularity": "per_group", "group_size": 32}
    mixed = {"wide": {"layer_name": ["down_proj"], "do_quant": True, "weight": {**weight, "bit": 8}}}
    llmc.compress(settings(source("llava"), text, tmp_path, "RTN", quant={"weight": weight, "mix_bits": mixed}))
    config = json.loads((tmp_path / VLLM / "config.json").read_text())
    original = json.loads((source("llava") / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == original
    model = reload(tmp_path / FAKE)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    outside = {name for name in linears if ".language_model.layers." not in name}
    stored = {name.removesuffix(".weight") for name in tensors(source("llava")) if name.endswith(".weight")}
    assert set(quantization["ignore"]) >= outside
    assert set(quantization["ignore"]) >= {name for name in stored if "projector" in name or name.endswith("fc1")}
    assert not any("language_model" in name and "layers" in name for name in quantization["ignore"])
    # Packed, as Transformers runs it: what isn't ignored has become another module.
    packed = reload(tmp_path / VLLM)
    modules = dict(packed.named_modules())
    bits = {
        name: module.quantization_scheme.weights.num_bits
        for name, module in modules.items()
        if hasattr(module, "quantization_scheme")
    }
    assert bits == {name: 8 if name.endswith("down_proj") else 4 for name in linears - outside}


def test_an_older_spelling_of_the_encoder_is_kept(source, text, tmp_path):
    """llava-hf's repositories have ``vision_tower.vision_model.encoder``."""
    folder = Path(shutil.copytree(source("llava"), tmp_path / "older"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {older(name): file for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in folder.glob("*.safetensors"):
        save_file({older(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    llmc.compress(settings(folder, text, tmp_path / "out", "RTN"))
    check_written(folder, tmp_path / "out", "llava")
    assert any(".vision_model." in name for name in tensors(tmp_path / "out" / VLLM))
    assert main(["verify", str(tmp_path / "out" / VLLM)]) == 0


def older(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_a_folder_is_verified_and_exported_again(source, text, tmp_path, capsys, name):
    both = settings(source(name), text, tmp_path / "both", "RTN")
    one = settings(source(name), text, tmp_path / "one", "RTN", save={"save_fake": False})
    llmc.compress(both)
    llmc.compress(one)
    assert main(["export", "--from", str(tmp_path / "one"), "--to", "fake"]) == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "both")
    folder, fake = str(tmp_path / "one" / VLLM), str(tmp_path / "one" / FAKE)
    assert main(["verify", folder, "--against", fake, "--load", "transformers"]) == 0, capsys.readouterr().out


def test_a_rotated_model_computes_what_the_original_did(source, text, tmp_path):
    saved = {"save_vllm": False, "save_fake": False, "save_trans": True}
    checkpoint = tmp_path / "exact"
    reload(source("llava")).save_pretrained(checkpoint)  # in float32: rounding would show
    shutil.copyfile(source("llava") / "tokenizer.json", checkpoint / "tokenizer.json")
    llmc.compress(settings(checkpoint, text, tmp_path / "out", ["Quarot", "RTN"], save=saved))
    sample = image_sample("llava").inputs
    before, after = (logits(reload(one), sample) for one in (checkpoint, tmp_path / "out" / "transformed_model"))
    assert torch.allclose(before, after, atol=2e-4)
    name = "multi_modal_projector.linear_2.bias"
    assert not torch.allclose(tensors(checkpoint)[name], tensors(tmp_path / "out" / "transformed_model")[name])


def test_dropping_a_block_leaves_the_encoder_whole(source, text, tmp_path):
    """The encoder has more layers than the language model, under the same last name."""
    saved = {"save_path": str(tmp_path), "save_fake": True}
    changes = {"sparse": DROP1, "save": saved}
    llmc.compress({**settings(source("llava"), text, None, "RTN"), **changes})
    model = reload(tmp_path / FAKE)
    assert len(model.model.language_model.layers) == 2
    before, after = tensors(source("llava")), tensors(tmp_path / FAKE)
    encoder = {name for name in before if name.startswith("vision_tower.")}
    assert encoder == {name for name in after if name.startswith("vision_tower.")}
    assert all(torch.equal(before[name], after[name]) for name in encoder)


DROP1 = {"method": "ShortGPT", "weight": {"n_prune_layers": 1}}
KV8 = {"method": "Naive", "bit": 8, "symmetric": True, "granularity": "per_token"}
W8A8_STATIC = {"act": {"bit": 8, "symmetric": True, "granularity": "per_tensor", "static": True}}


@pytest.mark.parametrize(
    ("name", "changes", "error", "said"),
    [
        ("llava", {"save": {"save_llamacpp": True, "save_vllm": False}}, ExportError, "save_llamacpp stores a"),
        ("llava", {"save": {"save_sgl": True}}, ExportError, "save_sgl stores a language model alone"),
        ("gemma3", {"quant": {"method": ["Quarot", "RTN"]}}, ModelError, "a norm stands behind each branch"),
        ("mllama", {"quant": W8A8_STATIC}, ConfigError, "text never reaches the blocks of Mllama"),
        ("mllama", {"quant": {"kvcache": KV8}}, ModelError, "attend to the image"),
        ("qwen3_vl", {"sparse": DROP1}, ModelError, "can't be dropped"),
        ("llava", {"model": {"type": "Qwen2VL"}}, ModelError, "set model.type to 'Llava'"),
        ("qwen2_vl", {"calib": {"name": "custom_mm", "preproc": None}}, DataError, r"llmc\[vision\]|processor"),
    ],
)  # fmt: skip
def test_what_does_not_go_is_refused_before_a_weight_is_read(
    source, text, tmp_path, monkeypatch, name, changes, error, said
):
    monkeypatch.setattr("llmc.run.run", lambda *_: pytest.fail("it began"))
    if "sparse" in changes:
        changes = {**changes, "save": {"save_vllm": False}}
    with pytest.raises(error, match=said):
        llmc.compress(
            settings(source(name), text, tmp_path / "out", "RTN" if name != "qwen2_vl" else "GPTQ", **changes)
        )


def test_images_for_a_model_that_reads_text_are_refused(source, questions, text, tmp_path):
    folder = tmp_path / "llama"
    auto: Any = AutoModelForCausalLM
    auto.from_config(CONFIGS["llava"].text_config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match="custom_mm brings images, and Llama reads text alone"):
        llmc.compress(settings(folder, text, None, "GPTQ", calib=with_images(questions)))


@pytest.mark.parametrize(("kind", "said"), [("internvl_chat", "ends in -hf"), ("llava_llama", "llava-hf/")])
def test_a_layout_of_remote_code_is_told_which_checkpoint_to_take(source, text, tmp_path, kind, said):
    folder = Path(shutil.copytree(source("internvl"), tmp_path / "remote"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(ModelError, match=said):
        llmc.compress(settings(folder, text, None, "RTN"))


def test_a_changed_image_is_another_run(source, questions, text, tmp_path):
    folder = Path(shutil.copytree(questions, tmp_path / "questions"))
    prints = []
    for _ in range(2):
        settled = load_config(
            settings(source("llava"), text, None, "GPTQ", calib=with_images(folder)), (), options_types()
        )
        prints.append(_fingerprint(prepare(settled))["calibration text"])
        shutil.copyfile(folder / "1.png", folder / "0.png")
    assert prints[0] != prints[1]


@pytest.mark.parametrize(("kind", "method"), [("quantizer", "OmniQuant"), ("pruner", "Wanda")])
def test_other_methods_pass_blocks_that_text_never_reaches(source, text, kind, method):
    content = settings(source("mllama"), text, None, method if kind == "quantizer" else "RTN")
    if kind == "pruner":
        content = {**content, "sparse": {"method": method, "weight": {"sparsity": 0.5}}}
    blocks = llmc.compress(content).metrics["blocks"]
    for index, row in enumerate(blocks):
        unseen = {"no calibration token reached it" in str(note["fallback"]) for note in row["layers"].values()}
        assert unseen == {index > 0}
        if kind == "pruner":
            assert all(abs(note["sparsity"] - 0.5) < 0.02 for note in row["layers"].values())
