"""Evaluation windows: the token chunks that a perplexity is computed on, and the name of the protocol that cut them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmc.data.files import Corpus, empty
from llmc.data.texts import Source, load_corpus, split_for
from llmc.data.tokens import Tokenizer, encode
from llmc.data.windows import document_windows
from llmc.errors import DataError

PROTOCOLS = ("gptq", "gptq_old")

C4_DOCUMENTS = 1100
C4_WINDOWS = 256


@dataclass(frozen=True)
class EvaluationSpec:
    """What to evaluate on.

    Attributes:
        name: wikitext2, c4 or ptb, or any name for local text.
        path: a saved data set, a text file, or a folder of them; ``#0.5:1`` at its end takes a fraction.
        download: fetch the public set from the hub; `path` is then ignored.
        seq_len: tokens in a window.
        num_chunks: at most so many windows, the first ones; None for all.
        protocol: "gptq", or "gptq_old" for the older way with ptb and c4.
        text_field: the records' field that holds the text; None to find it.
        first_tokens: only so many tokens of each window, the first ones; None for all.
    """

    name: str
    path: str | None
    download: bool
    seq_len: int
    num_chunks: int | None = None
    protocol: str = "gptq"
    text_field: str | None = None
    first_tokens: int | None = None


@dataclass(frozen=True)
class EvaluationWindows:
    """Windows to evaluate, and what is needed to compare their perplexity with another.

    Attributes:
        tokens: token ids, ``[windows, seq_len]`` int64.
        protocol: in words, to print beside every number.
        sha256: of the token ids as little-endian 64-bit integers, row by row.
    """

    tokens: Tensor
    protocol: str
    sha256: str


def evaluation_windows(spec: EvaluationSpec, tokenizer: Tokenizer) -> EvaluationWindows:
    """Cut the evaluation text into windows that don't overlap.

    The whole text is one string, tokenized once; what is left after the last full window is dropped. Public sets are
    tokenized with the tokenizer's special tokens (so a BOS stands in window 0 only), local text without.

    ========= ==================================== =====================================================
    set       gptq                                 gptq_old
    ========= ==================================== =====================================================
    wikitext2 test, joined by two newlines         the same
    ptb       test, joined by spaces               validation, joined by two newlines
    c4        the first 1100 validation documents, 256 random windows of random validation documents that
              joined by spaces, 256 windows        are longer than a window, seed 0
    ========= ==================================== =====================================================

    Args:
        spec: the text and how to cut it.
        tokenizer: the model's tokenizer.

    Raises:
        DataError: an unknown protocol, unreadable text, or less of it than one window.
    """
    if spec.protocol not in PROTOCOLS:
        raise DataError(f"there is no protocol '{spec.protocol}'", f"use one of {', '.join(PROTOCOLS)}")
    if spec.seq_len < 1 or (spec.num_chunks is not None and spec.num_chunks < 1):
        raise DataError(
            f"evaluation needs windows, but seq_len is {spec.seq_len} and num_chunks {spec.num_chunks}",
            "set seq_len to 2048, say, and num_chunks to null or at least 1",
        )
    old = spec.protocol == "gptq_old"
    split = "validation" if spec.name == "ptb" and old else split_for(spec.name, "evaluation")
    corpus = load_corpus(Source(spec.name, spec.path, spec.download, split, spec.text_field))
    if spec.name == "c4" and old and not corpus.is_local:
        tokens = _random_windows(corpus, tokenizer, spec.seq_len)
    else:
        tokens = _consecutive_windows(corpus, tokenizer, spec, old)
    tokens = tokens[: spec.num_chunks, : spec.first_tokens].contiguous()
    part = "" if tokens.shape[1] == spec.seq_len else f" (their first {tokens.shape[1]} tokens)"
    special = "no special tokens" if corpus.is_local else "the tokenizer's special tokens"
    return EvaluationWindows(
        tokens,
        f"{corpus.origin}, {spec.protocol} protocol, {len(tokens)} windows of {spec.seq_len}{part}, {special}",
        hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest(),
    )


def _consecutive_windows(corpus: Corpus, tokenizer: Tokenizer, spec: EvaluationSpec, old: bool) -> Tensor:
    if spec.name == "c4" and not corpus.is_local:
        text = " ".join(corpus.texts[:C4_DOCUMENTS])
        if not text.strip():
            raise empty(corpus.origin)
    else:
        text = corpus.joined(" " if spec.name == "ptb" and not old else "\n\n")
    tokens = encode(tokenizer, text, special=not corpus.is_local)
    if spec.name == "c4" and not corpus.is_local:
        tokens = tokens[: C4_WINDOWS * spec.seq_len]
    count = len(tokens) // spec.seq_len
    if count == 0:
        raise DataError(
            f"{corpus.origin} has {len(tokens)} tokens, less than one window of {spec.seq_len}",
            f"set eval.seq_len to {len(tokens)} or less, or give more text" if len(tokens) > 1 else "give more text",
        )
    return tokens[: count * spec.seq_len].view(count, spec.seq_len)


def _random_windows(corpus: Corpus, tokenizer: Tokenizer, seq_len: int) -> Tensor:
    windows, longest = document_windows(
        corpus.documents, partial(encode, tokenizer, special=True), C4_WINDOWS, seq_len, seed=0
    )
    if not windows:
        raise DataError(
            f"no document of {corpus.origin} is longer than a window of {seq_len} tokens; the longest has {longest}",
            "set eval.seq_len lower, or protocol to gptq",
        )
    return torch.stack(windows)
