"""Whole runs: calibrated with images or text, written, loaded again by Transformers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import logits, settings, with_images, words, write_processor, write_samples
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_vision import CONFIGS, SEVEN, image_sample
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.quantization_config import CompressedTensorsConfig

import llmc
from llmc.cli import main
from llmc.errors import ExportError
from llmc.run import run as real_run

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
@pytest.mark.parametrize("method", ["GPTQ"])
def test_calibrated_with_text_it_loads_again(source, text, tmp_path, name, method):
    out = tmp_path / "out"
    result = llmc.compress(settings(source(name), text, out, method, eval={**EVAL, "path": str(text)}))
    check_written(source(name), out, name)
    original, compressed = result.perplexities
    assert 1 < original.value < 10_000 and 1 < compressed.value < 10_000
    assert "AutoModelForImageTextToText" in result.outputs["save_fake"]["serve"]
    notes = {row["unit"]: row["layers"] for row in result.metrics["blocks"]}
    unseen = {unit for unit, layers in notes.items() if any(note["fallback"] for note in layers.values())}
    assert unseen == ({"block-1", "block-3"} if name == "mllama" else set())


@pytest.mark.parametrize("name", SEVEN)
@pytest.mark.parametrize("method", ["RTN", "Awq", "SmoothQuant"])
def test_every_method_runs_with_text(source, text, name, method):
    settled = settings(source(name), text, None, method)
    assert llmc.compress(settled).metrics["blocks"]


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("method", ["RTN", "GPTQ", "Awq", "SmoothQuant"])
def test_calibrated_with_images_it_loads_again(source, questions, text, tmp_path, name, method):
    out = tmp_path / "out"
    result = llmc.compress(settings(source(name), text, out, method, calib=with_images(questions)))
    check_written(source(name), out, name)
    assert not any(note["fallback"] for row in result.metrics["blocks"] for note in row["layers"].values())
