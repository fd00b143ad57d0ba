"""What llmc writes for llama.cpp is loaded by the real llama.cpp, which then predicts as the evaluated model does.

Only collected where llama.cpp is (see conftest.py): ``pip install llama-cpp-python`` builds it in some minutes.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import gguf
import pytest
import torch
from cases import words, write_pieces, write_tokenizer
from llamacpp_oracle import LlamaCppJob, llamacpp_python, run_llamacpp
from real import real_model, text
from test_gguf_models import CONFIGS, LLAMA3, SHAPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

import llmc
from llmc.export import Source
from llmc.export.gguf_file import write_gguf

CHUNKS, LENGTH = 2, 256
PROMPT = "The capital of France is"
GROUP = {"granularity": "per_group", "group_size": 32}
CHANNEL = {"granularity": "per_channel"}
# The input channels of all Linears but down_proj are no multiple of 256, so that no K-quant fits them.
SCHEMES = {
    "Q4_0": ({"bit": 4, "symmetric": True, **GROUP}, {"Q4_0"}),
    "Q5_0": ({"bit": 4, "symmetric": False, **GROUP}, {"Q5_0"}),
    "Q4_1": ({"bit": 4, "symmetric": False, "scale_digits": 7, **GROUP}, {"Q4_1"}),
    "Q8_0": ({"bit": 8, "symmetric": True, **CHANNEL}, {"Q8_0"}),
    "Q4_K": ({"bit": 4, "symmetric": False, **CHANNEL}, {"Q5_0", "Q4_K"}),
    "Q5_K": ({"bit": 5, "symmetric": False, **CHANNEL}, {"Q8_0", "Q5_K"}),
    "Q6_K": ({"bit": 6, "symmetric": True, **CHANNEL}, {"Q8_0", "Q6_K"}),
}


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    found = AutoTokenizer.from_pretrained(real_model())(Path(text("test")).read_text()[:20000]).input_ids
    return [found[index * LENGTH : (index + 1) * LENGTH] for index in range(CHUNKS)]


def perplexity_of(folder: Path, ids: list[list[int]]) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [float(model(torch.tensor([chunk]), labels=torch.tensor([chunk])).loss) for chunk in ids]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("name", SCHEMES)
def test_llama_cpp_computes_the_evaluated_model(name, ids, tmp_path):
    weight, types = SCHEMES[name]
    content = {
        "base": {"device": "cpu"},
        "model": {"path": str(real_model()), "torch_dtype": "float32"},
        "quant": {"method": "RTN", "weight": weight},
        "save": {"save_llamacpp": True, "save_fake": True, "save_path": str(tmp_path / name)},
    }
    llmc.compress(content)
    file = tmp_path / name / "llamacpp_quant_model" / "model.gguf"
    assert {one.tensor_type.name for one in gguf.GGUFReader(file).tensors} == types | {"BF16", "F32"}
    (result,) = run_llamacpp([LlamaCppJob(str(file), ids, PROMPT)], llamacpp_python())
    expected = perplexity_of(tmp_path / name / "fake_quant_model", ids)
    assert math.exp(sum(result.nll) / CHUNKS) == pytest.approx(expected, rel=1e-2)
    assert result.prompt_ids == tuple(AutoTokenizer.from_pretrained(real_model())(PROMPT).input_ids)
    if name != "Q4_K":  # 4 bits with one scale a row are too few for this model
        assert any(word in result.text for word in ("Paris", "France", "French", "city"))


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """Random weights, also in norms and biases."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


ROPES = {
    "llama 3.1": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "linear": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "yarn": Qwen2Config(**SHAPE, rope_parameters={**LLAMA3, "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
}


@pytest.mark.parametrize("kind", [*CONFIGS, *ROPES])
def test_llama_cpp_computes_every_architecture_as_transformers_does(kind, tmp_path):
    config = copy.deepcopy({**CONFIGS, **ROPES}[kind])
    config.vocab_size = 208  # as many as there are pieces, and some
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_pieces(folder)
    model = random_model(config)
    model.save_pretrained(folder)
    write_gguf([folder / "model.safetensors"], Source(folder, config.to_dict()), folder / "model.gguf")
    ids = torch.randint(3, 190, (1, 60), generator=torch.Generator().manual_seed(1))
    (result,) = run_llamacpp([LlamaCppJob(str(folder / "model.gguf"), ids.tolist())], llamacpp_python())
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    assert result.nll[0] == pytest.approx(expected, abs=5e-4)  # llama.cpp's cache is float16


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3_text", "phi3"])
def test_llama_cpp_computes_runs_of_families_with_tensors_of_their_own(kind, tmp_path):
    config = copy.deepcopy(CONFIGS[kind])
    config.vocab_size = 208
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_pieces(folder)
    random_model(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    (tmp_path / "calib.txt").write_text(words(1500, seed=1))
    content = {
        "base": {"device": "cpu"},
        "model": {"path": str(folder), "torch_dtype": "float32"},
        "calib": {
            "name": "custom_txt",
            "path": str(tmp_path / "calib.txt"),
            "n_samples": 8,
            "seq_len": 48,
            "preproc": "random_truncate_txt",
        },
        "quant": {"method": "GPTQ", "weight": {"bit": 4, "symmetric": True, **GROUP}},
        "save": {"save_llamacpp": True, "save_fake": True, "save_path": str(tmp_path / "run")},
    }
    llmc.compress(content)
    file = tmp_path / "run" / "llamacpp_quant_model" / "model.gguf"
    types = {one.name: one.tensor_type.name for one in gguf.GGUFReader(file).tensors}
    assert {types[name] for name in types if "_proj" in name or "ffn_down" in name} == {"Q4_0"}
    ids = torch.randint(3, 190, (1, 60), generator=torch.Generator().manual_seed(1))
    (result,) = run_llamacpp([LlamaCppJob(str(file), ids.tolist())], llamacpp_python())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "fake_quant_model", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    assert result.nll[0] == pytest.approx(expected, rel=1e-2)  # its products have inputs in 8 bits
