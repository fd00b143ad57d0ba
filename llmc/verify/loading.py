"""A real load: what a backend makes of the folder, in its own words and in numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.quantization_config import CompressedTensorsConfig

from ..errors import CheckpointError, DataError
from ..eval.perplexity import mean_losses, perplexity
from ..export import read_config
from ..stream.empty import auto_class
from .findings import Report

PROMPT = "The capital of France is"
NEW_TOKENS, WINDOW, WINDOWS = 24, 512, 8
_WORKER = Path(__file__).with_name("vllm_worker.py")
_SHOWN = 2000  # characters of what a backend says when it fails


def check_loading(folder: Path, backend: str, text: Path | None, report: Report) -> None:
    """Load, continue a prompt greedily, and measure the perplexity on a text.

    Raises:
        CheckpointError: the backend isn't installed.
        DataError: the text can't be read, or is too short for one window.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as problem:  # whatever a tokenizer raises on files that it can't use
        report.found(
            "tokenizer.json", "", f"Transformers can't load it: {_last(str(problem))}", "copy it from the original"
        )
        return
    windows = None if text is None else _windows(tokenizer, text)
    if backend == "vllm":
        _load_vllm(folder, windows, report)
    else:
        _load_transformers(folder, tokenizer, windows, report)


def _windows(tokenizer: Any, text: Path) -> Tensor:
    """Token ids ``[windows, length]``, the first of the text."""
    try:
        ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"--text {text} can't be read: {problem}", "name a text file") from problem
    count = min(WINDOWS, len(ids) // WINDOW)
    length = WINDOW if count else len(ids)
    if length < 2:
        raise DataError(f"--text {text} has {len(ids)} tokens", "name a longer text")
    return torch.tensor(ids[: max(count, 1) * length]).view(max(count, 1), length)


def _load_transformers(folder: Path, tokenizer: Any, windows: Tensor | None, report: Report) -> None:
    quantization = read_config(folder).get("quantization_config") or {}
    packed = quantization.get("quant_method") == "compressed-tensors"
    options: dict[str, Any] = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    try:
        auto = auto_class(AutoConfig.from_pretrained(folder))
        model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    except Exception as problem:  # whatever a loader raises on a folder that it can't load
        report.found("config.json", "", f"Transformers can't load it: {_last(str(problem))}")
        return
    for kind in ("missing_keys", "mismatched_keys"):
        for key in sorted(map(str, info.get(kind, ()))):
            report.found("config.json", key, f"Transformers loads it, but with {kind.replace('_', ' ')}")
    model.eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt.shape[1] :]
        losses = [] if windows is None else [_loss(model, window[None]) for window in windows]
    _tell("Transformers", tokenizer.decode(made), mean_losses(losses), report)


def _loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def _load_vllm(folder: Path, windows: Tensor | None, report: Report) -> None:
    """In a process of its own: vLLM wants other versions of many packages."""
    named = os.environ.get("LLMC_VLLM_PYTHON")
    if named is None and find_spec("vllm") is None:
        raise CheckpointError(
            "--load vllm: vLLM isn't installed here", "set LLMC_VLLM_PYTHON to the python of an environment that has it"
        )
    with tempfile.TemporaryDirectory() as scratch:
        job, answer = Path(scratch, "job.json"), Path(scratch, "answer.json")
        tokens = [] if windows is None else windows.tolist()
        job.write_text(json.dumps({"folder": str(folder), "tokens": tokens, "prompt": PROMPT, "count": NEW_TOKENS}))
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        command = [named or sys.executable, str(_WORKER), str(job), str(answer)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        except OSError as problem:
            raise CheckpointError(f"LLMC_VLLM_PYTHON: {named} can't be run: {problem}", "name a Python") from problem
        if done.returncode or not answer.exists():
            report.found("config.json", "", f"vLLM can't load it: {_last(done.stderr)}")
            return
        said = json.loads(answer.read_text())
    _tell("vLLM", said["text"], tuple(said["losses"]), report)


def _tell(backend: str, text: str, losses: tuple[float, ...], report: Report) -> None:
    measured = f", perplexity {perplexity(losses):.4f} on {len(losses)} windows" if losses else ""
    report.checked.append(f"{backend} loads it{measured}; {PROMPT!r} goes on: {' '.join(text.split())!r}")


def _last(said: str) -> str:
    """The last line of what a backend said."""
    lines = [line.strip() for line in said[-_SHOWN:].splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"
