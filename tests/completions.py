"""A small HTTP server that answers OpenAI's completions from a whole model, as a backend's does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel

NAME = "tiny"


@dataclass
class Backend:
    """What is served.

    Attributes:
        model: the model.
        tokenizer: writes its tokens as text.
        logprobs: whether it tells log-probabilities.
        fails: whether it refuses every completion.
        asked: every completion that it was asked for.
    """

    model: PreTrainedModel
    tokenizer: Any
    logprobs: bool = True
    fails: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)

    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        prompts = asked["prompt"] if isinstance(asked["prompt"][0], list) else [asked["prompt"]]
        return {"choices": [{"index": i, **self._choice(asked, ids)} for i, ids in enumerate(prompts)]}

    def _choice(self, asked: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        whole = list(ids)
        for _ in range(asked["max_tokens"]):
            whole.append(int(self.model(input_ids=torch.tensor([whole])).logits[0, -1].argmax()))
        text = self.tokenizer.decode(whole if asked.get("echo") else whole[len(ids) :])
        for stop in asked.get("stop") or []:
            text = text.partition(stop)[0]
        told = self._logprobs(whole) if asked.get("logprobs") and self.logprobs else None
        return {"text": text, "logprobs": told}

    def _logprobs(self, ids: list[int]) -> dict[str, Any]:
        """Of each token and of the most likely one; a server tells nothing of the first."""
        every = self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        own = [None, *(float(every[i, token]) for i, token in enumerate(ids[1:]))]
        best = [None, *({"best": float(row.max())} for row in every[:-1])]
        return {"token_logprobs": own, "top_logprobs": best}


@contextmanager
def serving(backend: Backend) -> Iterator[str]:
    """The address of its API while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": NAME}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            backend.asked.append(asked)
            if backend.fails:
                self.send_error(500, "out of memory")
            else:
                self.answer(backend.complete(asked))

        def answer(self, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
