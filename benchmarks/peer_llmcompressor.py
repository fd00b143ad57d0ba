"""Compresses a model with llm-compressor as the comparison protocol P1 says, and prints what that cost.

    python peer_llmcompressor.py --model DIR --calib valid.txt --method gptq --out DIR

It is run by the Python of an environment that has llm-compressor (tried with 0.14.0.1), on a CPU, in float32. All
Linears of the decoder blocks are compressed, lm_head is not; nothing is evaluated. The calibration file is tokenized as
one string without special tokens, and sample i is its tokens [i * seq_len, (i + 1) * seq_len).

  gptq  dampening 0.01, static act-order ("--actorder none" for none); 64 samples, symmetric unless --asym
  awq   scales found by a grid search of 20 points, then round to nearest; 16 samples, asymmetric unless --sym
  rtn, smoothquant    W8A8, a scale for each channel and each token; SmoothQuant 0.5 with 16 samples
  fp8   weights and activations in FP8 (e4m3), a scale for each channel and each token
  wanda, sparsegpt    two zeros in each run of four; 16 samples

The last line of stdout is one JSON object: ``seconds`` (wall) and ``cpu_seconds`` (user and system, of this process and
of the children it waited for) since the start of the process, so imports count; ``peak_rss_mb``; and ``phases``, the
wall seconds of load (imports, tokens, weights), oneshot and save.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEFAULT_SAMPLES = {"gptq": 64, "awq": 16, "rtn": 0, "fp8": 0, "smoothquant": 16, "wanda": 16, "sparsegpt": 16}
MB = 2**20


class Phases:
    """Wall seconds of each named part of a run."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model, in safetensors")
    parser.add_argument("--calib", type=Path, help="text file to calibrate with")
    parser.add_argument("--method", choices=sorted(DEFAULT_SAMPLES), required=True)
    parser.add_argument(
        "--samples", type=int, help="calibration samples (default: 64 for gptq, none for rtn and fp8, else 16)"
    )
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--asym", dest="symmetric", action="store_false", default=None)
    grid.add_argument("--sym", dest="symmetric", action="store_true")
    parser.add_argument("--actorder", choices=["static", "none"], default="static", help="for gptq")
    parser.add_argument("--out", type=Path, required=True, help="folder for the compressed model")
    args = parser.parse_args(argv)
    if args.symmetric is None:
        args.symmetric = args.method != "awq"
    if args.samples is None:
        args.samples = DEFAULT_SAMPLES[args.method]
    if args.samples and args.calib is None:
        parser.error(f"--method {args.method} needs --calib")
    return args


def make_pinning_harmless() -> None:
    """Let AWQ run without an accelerator.

    llm-compressor's AWQ pins the cached activations of every layer to speed up their copies to a GPU, without asking
    whether there is one; torch raises if there is none. Where tensors never leave host memory, not pinning them changes
    no number and costs no time.
    """
    import torch

    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda self, *_, **__: self


def calibration_set(tokenizer: Any, text_file: Path, n_samples: int, seq_len: int) -> Any:
    """The first ``n_samples`` consecutive windows of the tokenized file."""
    from datasets import Dataset

    ids = tokenizer(text_file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if len(ids) < n_samples * seq_len:
        raise SystemExit(f"{text_file} has {len(ids)} tokens; {n_samples} samples of {seq_len} need more")
    samples = [ids[i * seq_len : (i + 1) * seq_len] for i in range(n_samples)]
    return Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * seq_len] * n_samples})


def recipe(args: argparse.Namespace) -> list[Any]:
    """llm-compressor's modifiers for the method asked for."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    pruners = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
    if args.method in pruners:
        return [pruners[args.method](sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["lm_head"])]
    presets = {"rtn": "W8A8", "smoothquant": "W8A8", "fp8": "FP8_DYNAMIC"}
    if args.method in presets:
        smooth = [SmoothQuantModifier(smoothing_strength=0.5)] if args.method == "smoothquant" else []
        return [*smooth, QuantizationModifier(targets=["Linear"], scheme=presets[args.method], ignore=["lm_head"])]
    weights = {
        "num_bits": args.bits,
        "type": "int",
        "symmetric": args.symmetric,
        "strategy": "group",
        "group_size": args.group,
    }
    scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if args.method == "gptq":
        actorder = None if args.actorder == "none" else args.actorder
        return [GPTQModifier(**scheme, actorder=actorder, dampening_frac=0.01)]
    return [AWQModifier(), QuantizationModifier(**scheme)]


def calibration_options(args: argparse.Namespace, dataset: Any) -> dict[str, Any]:
    if dataset is None:
        return {}
    return {
        "dataset": dataset,
        "num_calibration_samples": args.samples,
        "max_seq_length": args.seq_len,
        "shuffle_calibration_samples": False,
    }


def compress(args: argparse.Namespace, phases: Phases) -> None:
    with phases.phase("load"):
        import torch
        from llmcompressor import oneshot
        from transformers import AutoModelForCausalLM, AutoTokenizer

        make_pinning_harmless()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        dataset = calibration_set(tokenizer, args.calib, args.samples, args.seq_len) if args.samples else None
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    with phases.phase("oneshot"):
        oneshot(model=model, recipe=recipe(args), **calibration_options(args, dataset))
    with phases.phase("save"):
        model.save_pretrained(args.out, save_compressed=True)
        tokenizer.save_pretrained(args.out)


def cost(phases: Phases) -> dict[str, Any]:
    """What this process has used so far."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(time.monotonic() - phases.start, 3),
        "cpu_seconds": round(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, 3),
        "peak_rss_mb": round(max(own.ru_maxrss, children.ru_maxrss) * 1024 / MB, 1),  # Linux counts KiB
        "phases": phases.seconds,
    }


def main() -> None:
    phases = Phases()
    args = parse_args()
    compress(args, phases)
    sys.stdout.flush()
    print(json.dumps({"method": args.method, **cost(phases)}))


if __name__ == "__main__":
    main()
