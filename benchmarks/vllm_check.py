"""Loads the vLLM exports of finished runs in the real vLLM and in Transformers, and compares what they say.

    python benchmarks/vllm_check.py --text test.txt RUN [RUN ...]

For each run folder (with ``vllm_quant_model`` and ``fake_quant_model``, or the former alone) it prints the mean
log-probability per token on the first chunks of the text by vLLM in bfloat16, by Transformers in bfloat16 and float32
from the same folder, whether Transformers' logits equal those of the fake-quantized folder bit for bit, and vLLM's
greedy continuation of a prompt. Where vLLM has no trustworthy kernel for this processor, the product alone is
computed in plain torch (``tests/backends/vllm_wna16.py``, ``vllm_int8.py``), and a line says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
from transformers.utils.quantization_config import CompressedTensorsConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "backends"))
from vllm_oracle import X86_NEEDS, VllmJob, kernel_gap, run_vllm, vllm_python

PROMPT = "The capital of France is"


def transformers_logits(folder: Path, dtype: torch.dtype, tokens: Tensor, *, packed: bool) -> Tensor:
    """Logits ``[chunks, length, vocabulary]`` in float32."""
    quantization = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **quantization).eval()
    with torch.no_grad():
        return torch.cat([model(chunk[None]).logits.float() for chunk in tokens])


def mean_logprob(logits: Tensor, tokens: Tensor) -> float:
    """Mean log-probability of each token but the first of every chunk."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return -float(losses)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", nargs="+", type=Path)
    arguments.add_argument("--text", type=Path, required=True)
    arguments.add_argument("--chunks", type=int, default=2)
    arguments.add_argument("--length", type=int, default=512)
    given = arguments.parse_args()
    logging.disable_progress_bar()
    for gap in filter(None, map(kernel_gap, X86_NEEDS)):
        print(f"note: {gap}; the product is computed in plain torch\n")
    folders = [run / "vllm_quant_model" for run in given.runs]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    ids = tokenizer(given.text.read_text(), add_special_tokens=False, verbose=False).input_ids
    tokens = torch.tensor(ids[: given.chunks * given.length]).view(given.chunks, given.length)
    jobs = [VllmJob(folder.parent.name, folder, tokens.tolist(), [PROMPT], 24) for folder in folders]
    results = run_vllm(jobs, vllm_python())
    print("| run | vLLM bf16 | Transformers bf16 | Transformers fp32 | equal to save_fake | greedy text |")
    print("|---|---|---|---|---|---|")
    for folder, result in zip(folders, results, strict=True):
        if result.error:
            print(f"| {result.name} | {result.error.strip().splitlines()[-1]} | | | | |")
            continue
        narrow = mean_logprob(transformers_logits(folder, torch.bfloat16, tokens, packed=True), tokens)
        wide = transformers_logits(folder, torch.float32, tokens, packed=True)
        fake = folder.parent / "fake_quant_model"
        same = "-"
        if fake.exists():
            same = "yes" if torch.equal(wide, transformers_logits(fake, torch.float32, tokens, packed=False)) else "NO"
        text = " ".join(result.samples[0].split())
        print(
            f"| {result.name} | {-result.nll:.4f} | {narrow:.4f} | {mean_logprob(wide, tokens):.4f} | {same} | {text} |"
        )


if __name__ == "__main__":
    main()
