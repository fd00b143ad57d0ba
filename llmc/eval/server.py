"""A server that speaks OpenAI's completions, such as ``vllm serve`` starts, as lm-eval asks it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, RunError
from .harness import import_lm_eval

if TYPE_CHECKING:
    from lm_eval.api.model import LM

_PATIENCE = 60  # seconds for one answer to a question about the server
_TIMEOUT = 600  # seconds for the answer to a batch of requests
_NEEDED = ("tenacity", "aiohttp", "requests")


def import_api() -> None:
    """What lm-eval needs to ask a server.

    Raises:
        ConfigError: it isn't installed.
    """
    import_lm_eval()
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"eval.server: lm-eval asks a server with the package {missing[0]}, which isn't installed",
            "pip install 'llmc[eval]'",
        )


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: where its API is, ``http://127.0.0.1:8000/v1``.
        model: which of its models is asked.
    """

    url: str
    model: str

    @classmethod
    def find(cls, url: str, wanted: str | None) -> Server:
        """See whether a server is there, and has the model.

        Args:
            url: where its API is.
            wanted: the model's name; None for the only one.

        Raises:
            RunError: nothing answers there, it answers something else, or has no such model.
        """
        url = url.rstrip("/")
        try:
            names = [str(model["id"]) for model in _ask(f"{url}/models")["data"]]
        except (KeyError, TypeError) as problem:
            raise RunError(
                f"eval.server: what answers at {url} has no list of models", "is it the address of an API, .../v1?"
            ) from problem
        if wanted is None and len(names) == 1:
            return cls(url, names[0])
        if wanted not in names:
            asked = "no model is named" if wanted is None else f"it doesn't have {wanted!r}"
            raise RunError(f"eval.server_model: {asked}; {url} has {', '.join(names) or 'none'}", "name one of them")
        return cls(url, wanted)

    def check_logprobs(self, token: int) -> None:
        """See whether it gives log-probabilities of a prompt's tokens, which all tasks need that don't generate.

        Raises:
            RunError: it doesn't.
        """
        asked = {"model": self.model, "prompt": [[token, token]], "max_tokens": 1, "echo": True, "logprobs": 1}
        problem: Exception | str = "it leaves them out"
        try:
            answer = _ask(f"{self.url}/completions", asked)
            logprobs = answer["choices"][0]["logprobs"]
            if len(logprobs["token_logprobs"]) >= 2 and logprobs["top_logprobs"][1]:
                return
        except (KeyError, IndexError, TypeError) as caught:
            problem = f"{type(caught).__name__}: {caught}"
        except RunError as caught:
            problem = caught.message
        raise RunError(
            f"eval.server: {self.url} gives no log-probabilities of a prompt (completions with echo and logprobs): "
            f"{problem}",
            "vLLM's server does; or evaluate tasks that generate text, or without a server",
        )

    def lm(self, folder: Path, limit: int, batch_size: int, *, adds_begin: bool) -> LM:
        """The server as lm-eval asks it, with token ids.

        Args:
            folder: of the tokenizer.
            limit: how many tokens the model can read.
            batch_size: prompts in one request.
            adds_begin: whether the tokenizer puts a token in front of every text by itself.
        """
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        return LocalCompletionsAPI(
            base_url=f"{self.url}/completions",
            model=self.model,
            tokenizer=str(folder),
            tokenizer_backend="huggingface",
            tokenized_requests=True,
            add_bos_token=adds_begin,
            max_length=limit,
            batch_size=batch_size,
            timeout=_TIMEOUT,
        )


def _ask(url: str, content: dict[str, Any] | None = None) -> Any:
    """An answer in JSON; a question with content is posted.

    Raises:
        RunError: nothing answers, or what answers refuses.
    """
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as problem:
        told = problem.read(300).decode(errors="replace")
        raise RunError(f"eval.server: {url} answers {problem.code}: {told}", "see what the server says") from problem
    except (OSError, ValueError) as problem:
        raise RunError(
            f"eval.server: nothing that is understood answers at {url}: {problem}",
            "start it, as with `vllm serve FOLDER`, and run `python -m llmc eval` with the same file",
        ) from problem
