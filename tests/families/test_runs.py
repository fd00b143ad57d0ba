"""Whole runs of every family: what is written loads, and is what was evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import words
from family_configs import CONFIGS
from tiny import Tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import llmc

FAKE, VLLM = "fake_quant_model", "vllm_quant_model"
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

    def run(family: Tiny, quant: dict[str, Any], **save: bool) -> llmc.Result:
        source = {"name": "text", "path": str(text), "bs": 2, "seq_len": WINDOW}
        content = {
            "base": {"seed": 42, "device": "cpu"},
            "model": {"path": str(family.folder), "torch_dtype": "float32", "trust_remote_code": family.remote},
            "calib": {**source, "n_samples": 4, "preproc": "sequential"},
            "eval": {**source, "num_chunks": 2, "eval_pos": ["pretrain", "transformed", "fake_quant"]},
            "quant": quant,
            "save": {"save_path": str(tmp_path / "out"), **save},
        }
        return llmc.compress(content)

    return run


@torch.no_grad()
def logits(family: Tiny, folder: Path, ids: Tensor, **options: Any) -> Tensor:
    """Of a folder as Transformers loads it."""
    options |= {"dtype": torch.float32, "trust_remote_code": family.remote}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()(input_ids=ids, use_cache=False).logits


def perplexity(logits: Tensor, ids: Tensor) -> float:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()


@pytest.mark.parametrize("scheme", RUNS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_compressed(family_of, compress, text, tmp_path, name, scheme):
    family = family_of(name)
    run = compress(family, RUNS[scheme], save_fake=True, save_vllm=True)
    found = {one.position: one.value for one in run.perplexities}
    tokenizer = AutoTokenizer.from_pretrained(family.folder, trust_remote_code=family.remote)
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][: 2 * WINDOW])
    ids = ids.view(2, WINDOW)
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
