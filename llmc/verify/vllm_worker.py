"""Runs a folder in vLLM: ``python vllm_worker.py JOB.json ANSWER.json``, by the Python of vLLM's environment.

It imports nothing of llmc. JOB has ``folder``, ``tokens`` (windows of ids), ``prompt`` and ``count`` (tokens to make);
ANSWER gets ``text`` and ``losses``, the mean cross entropy of each window's tokens but the first.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

_SHORTEST = 512  # tokens that the engine has room for


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load, score, continue."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    room = max(_SHORTEST, *(len(window) + 1 for window in job["tokens"])) if job["tokens"] else _SHORTEST
    engine = LLM(job["folder"], dtype="auto", enforce_eager=True, max_model_len=room, disable_log_stats=True, seed=0)
    losses = []
    for window in job["tokens"]:
        scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = engine.generate([{"prompt_token_ids": window}], scoring, use_tqdm=False)
        scored = [place[token].logprob for token, place in zip(window[1:], output.prompt_logprobs[1:], strict=True)]
        losses.append(-sum(scored) / len(scored))
    (sample,) = engine.generate([job["prompt"]], SamplingParams(temperature=0, max_tokens=job["count"]), use_tqdm=False)
    return {"text": sample.outputs[0].text, "losses": losses}


def main(job: Path, answer: Path) -> None:
    """Read, run, write."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    answer.write_text(json.dumps(run(json.loads(job.read_text()))))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules aren't to be taken for other packages
    main(Path(sys.argv[1]), Path(sys.argv[2]))
