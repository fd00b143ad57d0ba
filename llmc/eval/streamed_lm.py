"""A model as lm-eval sees it whose log-likelihoods are all found in one pass over its weights.

lm-eval asks for one kind of request after the other, and waits for the answers. A streamed model answers all of them
together: at the first question the requests of all kinds and tasks are collected, scored, and the answers kept. Texts
become tokens exactly as in lm-eval's own ``HFLM``, so that scores can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..errors import DataError
from .scoring import Continuation, Likelihood

Score = Callable[[Collection[Continuation]], Mapping[Continuation, Likelihood]]
Generate = Callable[[Sequence[Instance]], list[str]]
Pair = tuple[list[int], list[int]]


class StreamedLM(TemplateLM):  # type: ignore[misc]
    """Answers lm-eval's requests.

    Args:
        tokenizer: the model's.
        limit: how many tokens the model can read.
        score: finds likelihoods, in one pass over the model.
        generate: continues texts; each request is one of lm-eval's.
        instances: all requests of all tasks, once lm-eval has built them.

    Raises:
        DataError: the tokenizer has neither a token that begins nor one that ends a text.
    """

    def __init__(
        self, tokenizer: Any, limit: int, score: Score, generate: Generate, instances: Callable[[], Iterable[Instance]]
    ) -> None:
        super().__init__()
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise DataError(
                "tasks need a token that stands in front of a text, and the tokenizer has neither bos_token nor "
                "eos_token",
                "name one in tokenizer_config.json",
            )
        self.tokenizer, self.max_length = tokenizer, limit
        self._score, self._generate, self._instances = score, generate, instances
        self._wanted: dict[Continuation, None] = {}
        self._found: Mapping[Continuation, Likelihood] | None = None

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text, if the tokenizer has one."""
        end = self.tokenizer.eos_token_id
        return None if end is None else int(end)

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without context."""
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return int(end if begin is None else begin)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer has it, but none in front of a text that begins with one."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model knows."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-probability in nats of each continuation, and whether greedy decoding would give it."""
        self._score_all()
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability in nats of each whole text, read in windows side by side."""
        self._score_all()
        return self._rolling(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Texts that continue the requests'."""
        return self._generate(requests)

    def _score_all(self) -> None:
        """Collect what all tasks ask, whichever kind lm-eval wants first, and score it together."""
        if self._found is not None:
            return
        by_kind: dict[str, list[Instance]] = {}
        for one in self._instances():
            by_kind.setdefault(one.request_type, []).append(one)
        super().loglikelihood(by_kind.get("loglikelihood", []), disable_tqdm=True)
        self._rolling(by_kind.get("loglikelihood_rolling", []))
        self._found = self._score(self._wanted)

    def _rolling(self, requests: Iterable[Instance]) -> list[float]:
        windows = [self._windows(one.args[0]) for one in requests]
        flat = iter(self._loglikelihood_tokens([(("", ""), *pair) for pairs in windows for pair in pairs]))
        return [sum(next(flat)[0] for _ in pairs) for pairs in windows]

    def _windows(self, text: str) -> list[Pair]:
        """Context and continuation of each window of a text; a window's context is the one token before it."""
        rolling = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in rolling]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """The answers; while requests are collected, anything."""
        asked = [Continuation.of(context, continuation, self.max_length) for _, context, continuation in requests]
        if self._found is None:
            self._wanted |= dict.fromkeys(asked)
            return [(0.0, False)] * len(asked)
        found = [self._found[one] for one in asked]
        return [(one.total, one.greedy) for one in found]
