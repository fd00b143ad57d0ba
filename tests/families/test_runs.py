"""Whole runs of every family: what is written loads, and is what was evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import files_of, words
from family_configs import CONFIGS
from tiny import Tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import llmc
from llmc.errors import CheckpointError
from llmc.run import Silent
from llmc.stream.headers import read_headers
from llmc.stream.source import read_tensor

FAKE, VLLM, TRANS = "fake_quant_model", "vllm_quant_model", "transformed_model"
WINDOW = 12
LARGEST = {"W4A16": 0.3, "W8A8": 0.05}  # change of the logits, relative
W4A16 = {"weight": {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 32}}
W8A8 = {
    "weight": {"bit": 8, "symmetric": True, "granularity": "per_channel"},
    "act": {"bit": 8, "symmetric": True, "granularity": "per_token"},
}
RUNS: dict[str, dict[str, Any]] = {
    "W4A16": {"method": ["Awq", "GPTQ"], **W4A16, "special": {"Awq": {"do_gqa_trans": True}}},
    "W8A8": {"method": ["SmoothQuant", "RTN"], **W8A8},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To calibrate and to evaluate on."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(words(120, seed=1))
    return file


@pytest.fixture
def compress(text: Path, tmp_path: Path) -> Callable[..., llmc.Result]:
    """A run over a tiny checkpoint into the test's folder."""

    def run(
        family: Tiny, save: tuple[str, ...], folder: str = "out", listener: Silent | None = None, **sections: Any
    ) -> llmc.Result:
        source = {"name": "text", "path": str(text), "bs": 2, "seq_len": WINDOW}
        content = {
            "base": {"seed": 42, "device": "cpu"},
            "model": {"path": str(family.folder), "torch_dtype": "float32", "trust_remote_code": family.remote},
            "calib": {**source, "n_samples": 4, "preproc": "sequential"},
            "eval": {**source, "num_chunks": 2, "eval_pos": ["pretrain", "transformed", "fake_quant"]},
            "save": {"save_path": str(tmp_path / folder), **dict.fromkeys(save, True)},
            **sections,
        }
        return llmc.compress(content, listener=listener)

    return run


@torch.no_grad()
def logits(family: Tiny, folder: Path, ids: Tensor, **options: Any) -> Tensor:
    """Of a folder as Transformers loads it."""
    options |= {"dtype": torch.float32, "trust_remote_code": family.remote}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()(input_ids=ids, use_cache=False).logits


def perplexity(logits: Tensor, ids: Tensor) -> float:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()


def tokens_of(family: Tiny, text: Path) -> Tensor:
    """What is evaluated on."""
    tokenizer = AutoTokenizer.from_pretrained(family.folder, trust_remote_code=family.remote)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][: 2 * WINDOW]
    return torch.tensor(ids).view(2, WINDOW)


@pytest.mark.parametrize("scheme", RUNS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_compressed(family_of, compress, text, tmp_path, name, scheme):
    family = family_of(name)
    run = compress(family, ("save_fake", "save_vllm"), quant=RUNS[scheme])
    found = {one.position: one.value for one in run.perplexities}
    ids = tokens_of(family, text)
    original = logits(family, family.folder, ids)
    fake = logits(family, tmp_path / "out" / FAKE, ids)
    dense = CompressedTensorsConfig(dequantize=True)
    assert torch.equal(logits(family, tmp_path / "out" / VLLM, ids, quantization_config=dense), fake)
    assert found["pretrain"] == pytest.approx(perplexity(original, ids), rel=1e-5)
    assert found["transformed"] == pytest.approx(found["pretrain"], rel=1e-2)
    if scheme == "W4A16":  # no inputs are rounded, which weights alone can't do
        assert found["fake_quant"] == pytest.approx(perplexity(fake, ids), rel=1e-5)
    assert 0 < (fake - original).norm() / original.norm() < LARGEST[scheme]
    packed = {layer for block in run.metrics["blocks"] for layer in block["layers"]}
    assert packed == {name for own in family.block_subsets for subset in own for name in subset.linears}


@pytest.mark.parametrize("name", ["gemma", "phi-qk-norm", "bigcode", "falcon-40b", "minicpm", "chatglm-layernorm"])
def test_a_rotated_checkpoint_is_the_original(family_of, compress, text, tmp_path, name):
    """Stored in float32. An offset of norms, a head with a bias or tied to the embedding, multi-query attention, norms
    that subtract the mean."""
    family = family_of(name, torch.float32)
    quant = {"method": ["Quarot", "RTN"], **W4A16}
    run = compress(family, ("save_trans", "save_vllm", "save_fake"), quant=quant)
    found = {one.position: one.value for one in run.perplexities}
    assert found["transformed"] == pytest.approx(found["pretrain"], rel=1e-5)
    assert found["fake_quant"] != pytest.approx(found["pretrain"], rel=1e-4)
    ids = tokens_of(family, text)
    original, rotated = logits(family, family.folder, ids), logits(family, tmp_path / "out" / TRANS, ids)
    torch.testing.assert_close(rotated, original, rtol=0, atol=1e-4 * original.abs().max().item())
    dense = CompressedTensorsConfig(dequantize=True)
    fake = logits(family, tmp_path / "out" / FAKE, ids)
    assert torch.equal(logits(family, tmp_path / "out" / VLLM, ids, quantization_config=dense), fake)


@pytest.mark.parametrize("name", ["chatglm", "smollm3", "bloom"])
def test_a_model_with_fewer_blocks_loads(family_of, compress, text, tmp_path, name):
    """Whose number of blocks is called otherwise, or whose configuration lists something of each."""
    family = family_of(name)
    run = compress(family, ("save_trans",), sparse={"method": "ShortGPT", "weight": {"n_prune_layers": 1}})
    found = {one.position: one.value for one in run.perplexities}
    ids = tokens_of(family, text)
    smaller = logits(family, tmp_path / "out" / TRANS, ids)
    assert found["transformed"] == pytest.approx(perplexity(smaller, ids), rel=1e-5)
    assert found["transformed"] != pytest.approx(found["pretrain"], rel=1e-3)


def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(family_of, compress):
    family = family_of("internlm2")
    with pytest.raises(CheckpointError) as refused:
        compress(replace(family, remote=False), ("save_fake",), quant=RUNS["W8A8"])
    assert "model.trust_remote_code: True" in refused.value.remedy


class Killed(BaseException):
    """As by SIGKILL: nothing of the run's own catches it."""


class Fatal(Silent):
    """Kills a run behind its first block."""

    def block(self, index: int, row: dict[str, Any]) -> None:
        raise Killed


@pytest.mark.parametrize("name", ["bloom", "falcon-7b", "chatglm", "gemma3"])
def test_a_killed_run_ends_with_the_same_bytes(family_of, compress, tmp_path, name):
    """Where blocks return tuples, or are called in several ways."""
    family = family_of(name)
    options = {"save": ("save_vllm",), "quant": RUNS["W4A16"]}
    calm = compress(family, folder="calm", **options)
    with pytest.raises(Killed):
        compress(family, folder="killed", listener=Fatal(), **options)
    again = compress(family, folder="killed", **options)
    assert [one.value for one in again.perplexities] == [one.value for one in calm.perplexities]
    assert files_of(tmp_path / "killed" / VLLM) == files_of(tmp_path / "calm" / VLLM)


def test_linears_side_by_side_share_a_global_scale_only_where_they_are_run_as_one(family_of, compress, tmp_path):
    compress(family_of("phi"), ("save_vllm",), quant={"method": "RTN", "weight": {"bit": "nvfp4", "symmetric": True}})
    scales = {}
    for entry in read_headers(tmp_path / "out" / VLLM).values():
        if ".layers.0." in entry.name and entry.name.endswith("weight_global_scale"):
            scales[entry.name.split(".")[-2]] = read_tensor(entry).item()
    assert scales["q_proj"] == scales["k_proj"] == scales["v_proj"] != scales["fc1"]
