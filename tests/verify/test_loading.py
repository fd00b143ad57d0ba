"""A real load: by Transformers with the perplexity of its own model, and by whatever stands for vLLM."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from folders import Export, change
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmc.cli import main
from llmc.errors import CheckpointError, DataError
from llmc.verify import loading, verify

WORDS = 190


@pytest.fixture
def loadable(copied, tmp_path) -> Export:
    """With a tokenizer: one word, one token."""
    made = copied("w4")
    vocabulary = {"<unk>": 0, **{f"w{index}": index + 1 for index in range(WORDS)}}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    (made.vllm / "tokenizer.json").unlink()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(made.vllm)
    fake = shutil.copytree(made.fake, tmp_path / "fake")
    return Export(made.vllm, fake, made.original)


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{(7 * index + index // 5) % WORDS}" for index in range(3 * 16 + 5)))
    return file


def test_transformers_measures_what_the_dense_twin_says(loadable, text, monkeypatch):
    monkeypatch.setattr(loading, "WINDOW", 16)
    report = verify(loadable.vllm, load="transformers", text=text)
    assert (report.exit_code, [str(one) for one in report.findings]) == (0, [])
    said = report.checked[-1]
    ids = torch.tensor([1 + (7 * index + index // 5) % WORDS for index in range(48)]).view(3, 16)
    model = AutoModelForCausalLM.from_pretrained(loadable.fake, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(one[None]).logits[0, :-1], one[1:]).item() for one in ids]
    assert f"perplexity {math.exp(sum(losses) / 3):.4f} on 3 windows" in said
    assert "'The capital of France is' goes on: 'w" in said


def test_what_transformers_cannot_load_is_a_finding(loadable, capsys):
    (loadable.vllm / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    assert main(["verify", str(loadable.vllm), "--load", "transformers"]) == 1
    assert "Transformers can't load it" in capsys.readouterr().out


def test_tensors_that_transformers_misses_are_findings(loadable):
    name = "model.layers.2.input_layernorm.weight"
    change(loadable.vllm, name, lambda tensor: None)
    report = verify(loadable.vllm, load="transformers")
    assert any(one.tensor == name and "with missing keys" in one.problem for one in report.findings)


def test_a_folder_without_a_tokenizer_is_a_finding(copied):
    report = verify(copied("w4").vllm, load="transformers")
    assert [one.place for one in report.findings] == ["tokenizer.json"]


def test_a_text_that_cannot_be_used_is_refused(loadable, tmp_path):
    with pytest.raises(DataError, match="can't be read"):
        verify(loadable.vllm, load="transformers", text=tmp_path / "nothing.txt")
    (tmp_path / "short.txt").write_text("w1")
    with pytest.raises(DataError, match="has 1 tokens"):
        verify(loadable.vllm, load="transformers", text=tmp_path / "short.txt")


VLLM = """
import importlib.util

assert importlib.util.find_spec("comparison") is None, "the worker's neighbours are taken for packages"

class SamplingParams:
    def __init__(self, **options):
        self.options = options

class Output:
    text = "Paris, of course."

class Result:
    outputs = [Output()]
    prompt_logprobs = None

class Place:
    logprob = -2.0

class LLM:
    def __init__(self, folder, **options):
        assert options["max_model_len"] >= 17 and options["enforce_eager"]
        if "broken" in folder:
            raise ValueError("There is no module or parameter named x")

    def generate(self, prompts, params, use_tqdm):
        result = Result()
        if "prompt_logprobs" in params.options:
            ids = prompts[0]["prompt_token_ids"]
            result.prompt_logprobs = [None, *({token: Place()} for token in ids[1:])]
        return [result]
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> None:
    """A Python whose vLLM says the same of everything."""
    package = tmp_path / "vllm-stand-in"
    package.mkdir()
    (package / "vllm.py").write_text(VLLM)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={package} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("LLMC_VLLM_PYTHON", str(python))
    monkeypatch.setattr(loading, "WINDOW", 16)


def test_vllm_is_asked_in_its_own_process(loadable, text, stand_in):
    report = verify(loadable.vllm, load="vllm", text=text)
    assert report.exit_code == 0
    assert report.checked[-1] == (
        f"vLLM loads it, perplexity {math.exp(2):.4f} on 3 windows; "
        "'The capital of France is' goes on: 'Paris, of course.'"
    )


def test_what_vllm_says_of_a_folder_that_it_cannot_load_is_the_finding(loadable, stand_in):
    broken = loadable.vllm.rename(loadable.vllm.parent / "broken")
    (finding,) = verify(broken, load="vllm").findings
    assert "vLLM can't load it: ValueError: There is no module or parameter named x" in finding.problem


def test_without_vllm_it_says_how_to_name_one(loadable, monkeypatch):
    monkeypatch.delenv("LLMC_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="vLLM isn't installed here"):
        verify(loadable.vllm, load="vllm")
    monkeypatch.setenv("LLMC_VLLM_PYTHON", str(Path(loadable.vllm, "no-python")))
    with pytest.raises(CheckpointError, match="can't be run"):
        verify(loadable.vllm, load="vllm")
    assert json.loads((loadable.vllm / "config.json").read_text())
