"""Runs GGUF files in llama.cpp, in whatever Python has llama-cpp-python; it needs nothing of llmc.

    python llamacpp_worker.py JOBS.json OUT.json

The tests talk to it through ``llamacpp_oracle.py``. JOBS is a list of objects with ``model`` (a file), ``chunks``
(lists of token ids), ``prompt`` (a text or null), ``new_tokens``; OUT gets for each the ``nll`` of every chunk (the
mean cross entropy of its tokens but the first), the ``prompt_ids`` by llama.cpp's tokenizer, and the greedy ``text``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama


def cross_entropy(logits: np.ndarray, ids: list[int]) -> float:
    """Mean of the next tokens' losses; ``logits`` ``[tokens, vocabulary]``."""
    scores = logits[: len(ids) - 1].astype(np.float64)
    largest = scores.max(-1, keepdims=True)
    total = largest[:, 0] + np.log(np.exp(scores - largest).sum(-1))
    return float((total - scores[np.arange(len(ids) - 1), ids[1:]]).mean())


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One file."""
    context = max(len(chunk) for chunk in job["chunks"])
    model = Llama(
        job["model"], n_ctx=context, n_batch=context, logits_all=True, n_threads=job["threads"], verbose=False
    )
    losses = []
    for chunk in job["chunks"]:
        model.reset()
        model.eval(chunk)
        losses.append(cross_entropy(model.scores[: len(chunk)], chunk))
    if job["prompt"] is None:
        return {"nll": losses, "prompt_ids": [], "text": ""}
    ids = model.tokenize(job["prompt"].encode(), add_bos=False, special=False)
    text = model.create_completion(job["prompt"], max_tokens=job["new_tokens"], temperature=0.0, top_k=1)
    return {"nll": losses, "prompt_ids": list(ids), "text": text["choices"][0]["text"]}


def main(jobs: str, out: str) -> None:
    answers = [run(job) for job in json.loads(Path(jobs).read_text())]
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
