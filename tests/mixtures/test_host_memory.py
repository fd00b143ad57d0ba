"""Experts that stay in the host's memory are where the tokens are whenever somebody computes with them."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from cases import words, write_tokenizer
from families import CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmc
from llmc import prepare
from llmc.models.experts import HostMemory


class Cipher(HostMemory):
    """Stands for another device: what is stored can't be computed with until it's fetched."""

    def __init__(self, device: torch.device) -> None:
        self.stored: set[int] = set()

    def holds(self, weight: Tensor) -> bool:
        return weight.data_ptr() in self.stored

    def fetch(self, weight: Tensor) -> Tensor:
        return _flipped(weight)

    def store(self, weight: Tensor) -> Tensor:
        kept = _flipped(weight)
        self.stored.add(kept.data_ptr())
        _ALIVE.append(kept)  # its address stays its own
        return kept


_ALIVE: list[Tensor] = []


def _flipped(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.int32).bitwise_not().view(weight.dtype)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen2-moe"], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "calib.txt").write_text(words(500, seed=1))
    (folder / "eval.txt").write_text(words(80, seed=2))
    return folder


@pytest.mark.parametrize("method", ["RTN", "GPTQ", "Awq", ["SmoothQuant", "GPTQ"], "OmniQuant"], ids=str)
def test_the_results_are_the_same(method, source, tmp_path, monkeypatch):
    special = {"special": {"epochs": 1, "let": True}} if method == "OmniQuant" else {}
    content = yaml.safe_load(
        f"""
        model: {{path: '{source}', torch_dtype: float32}}
        calib: {{name: custom_txt, path: '{source}/calib.txt', n_samples: 4, seq_len: 24, preproc: random_truncate_txt}}
        eval: {{eval_pos: [fake_quant], name: custom_ppl, path: '{source}/eval.txt', seq_len: 24}}
        quant: {{weight: {{bit: 4, symmetric: false, granularity: per_group, group_size: 32}}}}
        save: {{save_vllm: true}}
        """
    )
    content["quant"] |= {"method": method, **special}
    results, before = [], len(_ALIVE)
    for name in ("here", "elsewhere"):
        if name == "elsewhere":
            monkeypatch.setattr(prepare, "experts_on_host", lambda *_: True)
            monkeypatch.setattr(prepare, "HostMemory", Cipher)
        content["save"]["save_path"] = str(tmp_path / name)
        results.append(llmc.compress(json.loads(json.dumps(content))))
    assert len(_ALIVE) > before
    assert results[0].perplexities[0].value == results[1].perplexities[0].value
    here, elsewhere = (
        sorted((tmp_path / name / "vllm_quant_model").glob("*.safetensors")) for name in ("here", "elsewhere")
    )
    assert [file.read_bytes() for file in here] == [file.read_bytes() for file in elsewhere]
