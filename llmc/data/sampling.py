"""Calibration samples: the public presets, each drawing its samples from the seed alone."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy
import torch
from torch import Tensor

from llmc.data.files import Corpus, empty
from llmc.data.texts import Source, load_corpus, split_for
from llmc.data.tokens import Tokenizer, encode, render_chat
from llmc.data.windows import document_windows
from llmc.errors import DataError

logger = logging.getLogger(__name__)

AWQ_LONGEST_DOCUMENT = 512
"""pileval_awq leaves out documents of more tokens than this, whatever the sample length."""

OMNI_DOCUMENTS = 1000
"""pileval_omni joins only so many of the first documents."""

MIX = "mix"
MIXED: Mapping[str, str] = {"wikitext2": "wikitext2_gptq", "ptb": "wikitext2_gptq", "c4": "c4_gptq"}
"""The sets of ``mix`` and the preset of each. All of ptb is joined by two newlines here, not by spaces."""


@dataclass(frozen=True)
class CalibrationSpec:
    """What to calibrate with.

    Attributes:
        name: a public set (wikitext2, c4, ptb, pileval, ultrachat), ``mix``, or any name for local text.
        path: a saved data set, a text file, or a folder of them; ``#0:0.5`` at its end takes a fraction. For ``mix``
            a folder with one for each of its sets, by their names.
        download: fetch the public set from the hub; `path` is then ignored.
        n_samples: how many samples; always met exactly, or it is an error.
        seq_len: tokens in a sample; None for original_txt only. pileval_smooth and ultrachat_general cut longer
            documents to it and leave shorter ones short.
        preproc: one of `PRESETS`.
        seed: the only source of randomness.
        text_field: the records' field that holds the text; None to find it.
        apply_chat_template: write each document as a conversation first; not for presets that join the whole text.
    """

    name: str
    path: str | None
    download: bool
    n_samples: int
    seq_len: int | None
    preproc: str
    seed: int = 42
    text_field: str | None = None
    apply_chat_template: bool = False


@dataclass(frozen=True)
class _Draw:
    """What a preset works from."""

    corpus: Corpus
    tokenizer: Tokenizer
    n_samples: int
    seq_len: int
    seed: int

    def encode(self, text: str) -> Tensor:
        """Tokenize with the tokenizer's special tokens, unless the chat template has written them already."""
        return encode(self.tokenizer, text, special=not self.corpus.is_rendered)

    def shuffled(self) -> Iterator[str]:
        """Yield the documents that aren't blank, in the order of ``datasets.Dataset.shuffle(seed)``."""
        for index in numpy.random.default_rng(self.seed).permutation(len(self.corpus.documents)):
            text = self.corpus.documents[int(index)]
            if text.strip():
                yield text

    def too_little(self, found: str, fitting: str) -> DataError:
        wanted = f"{self.n_samples} samples of {self.seq_len} tokens" if self.seq_len else f"{self.n_samples} samples"
        return DataError(f"{self.corpus.origin} is too little for {wanted}: {found}", f"{fitting}, or give more text")


def calibration_samples(spec: CalibrationSpec, tokenizer: Tokenizer) -> list[Tensor]:
    """Draw the calibration samples.

    Args:
        spec: the text and how to sample it.
        tokenizer: the model's tokenizer.

    Returns:
        `spec.n_samples` tensors of token ids, each ``[tokens]`` int64; equal for equal specs and tokenizers.

    Raises:
        DataError: an unknown preset, options that don't go together, unreadable text, or too little of it.
    """
    if spec.name == MIX:
        return _mixed(spec, tokenizer)
    preset = PRESETS.get(spec.preproc)
    if preset is None:
        raise DataError(f"there is no preset '{spec.preproc}'", f"set calib.preproc to one of {', '.join(PRESETS)}")
    _check(spec, preset)
    chat = spec.apply_chat_template or preset.needs_chat
    source = Source(
        spec.name,
        spec.path,
        spec.download,
        split_for(spec.name, "calibration"),
        spec.text_field,
        partial(render_chat, tokenizer) if chat else None,
    )
    corpus = load_corpus(source)
    if len(corpus.documents) == 0:
        raise empty(corpus.origin)
    samples = preset.draw(_Draw(corpus, tokenizer, spec.n_samples, spec.seq_len or 0, spec.seed))
    if len(samples) != spec.n_samples:
        raise DataError(
            f"{spec.preproc} made {len(samples)} of calib.n_samples {spec.n_samples} samples",
            "set calib.n_samples to that, or give it more text",
        )
    return samples


def _mixed(spec: CalibrationSpec, tokenizer: Tokenizer) -> list[Tensor]:
    """A third from each set in turn, every third drawn with the same seed: what RPTQ calibrates on (its ``mix``)."""
    if spec.n_samples % len(MIXED):
        raise DataError(f"calib.n_samples is {spec.n_samples}", f"{MIX} needs a multiple of {len(MIXED)}")
    samples = []
    for name, preproc in MIXED.items():
        path = None if spec.path is None else f"{spec.path}/{name}"
        part = replace(spec, name=name, path=path, n_samples=spec.n_samples // len(MIXED), preproc=preproc)
        samples += calibration_samples(part, tokenizer)
    return samples


def _check(spec: CalibrationSpec, preset: Preset) -> None:
    if spec.n_samples < 1:
        raise DataError(f"calib.n_samples is {spec.n_samples}", "set it to 1 or more")
    if preset.whole_documents and spec.seq_len is not None:
        raise DataError(
            f"{spec.preproc} takes each document whole, but seq_len is {spec.seq_len}", "set seq_len to null"
        )
    if not preset.whole_documents and (spec.seq_len is None or spec.seq_len < 1):
        raise DataError(f"{spec.preproc} needs a sample length, but seq_len is {spec.seq_len}", "set it, to 2048 say")
    if spec.apply_chat_template and preset.joins:
        by_document = ", ".join(name for name, other in PRESETS.items() if not other.joins)
        raise DataError(
            f"{spec.preproc} joins the whole text, so a chat template has nothing to apply to",
            f"set apply_chat_template to false, or preproc to one of {by_document}",
        )


def _random_windows(draw: _Draw, text: str) -> list[Tensor]:
    """Tokenize once and cut windows at random places, as GPTQ does: they may overlap."""
    tokens, length = draw.encode(text), draw.seq_len
    if len(tokens) < length:
        raise draw.too_little(f"it has {len(tokens)} tokens", f"set seq_len to {len(tokens)} or less")
    if len(tokens) < draw.n_samples * length:
        logger.warning(
            "%s has %d tokens: %d random windows of %d overlap", draw.corpus.origin, len(tokens), draw.n_samples, length
        )
    generator = random.Random(draw.seed)
    last = max(len(tokens) - length - 1, 0)
    starts = [generator.randint(0, last) for _ in range(draw.n_samples)]
    return [tokens[start : start + length].clone() for start in starts]


def _joined_windows(separator: str, draw: _Draw) -> list[Tensor]:
    return _random_windows(draw, draw.corpus.joined(separator))


def _pileval_omni(draw: _Draw) -> list[Tensor]:
    text = "\n\n".join(draw.corpus.texts[:OMNI_DOCUMENTS])
    if not text.strip():
        raise empty(draw.corpus.origin)
    return _random_windows(draw, text)


def _random_truncate_txt(draw: _Draw) -> list[Tensor]:
    documents = [text for text in draw.corpus.documents if text.strip()]
    if not documents:
        raise empty(draw.corpus.origin)
    random.Random(draw.seed).shuffle(documents)
    return _random_windows(draw, "\n\n".join(documents))


def _c4_gptq(draw: _Draw) -> list[Tensor]:
    """Draw random documents until one is longer than a sample, then a random window of it."""
    samples, longest = document_windows(draw.corpus.documents, draw.encode, draw.n_samples, draw.seq_len, draw.seed)
    if not samples:
        raise draw.too_little(
            f"a document must be longer than a sample, and the longest has {longest} tokens",
            f"set seq_len to {longest - 1} or less" if longest > 1 else "use a preset that joins the documents",
        )
    return samples


def _pileval_awq(draw: _Draw) -> list[Tensor]:
    """Shuffle, keep the short documents, concatenate, cut: the AWQ convention, gone on with until there are enough."""
    wanted, kept, count = draw.n_samples * draw.seq_len, [], 0
    for text in draw.shuffled():
        tokens = draw.encode(text.strip())
        if len(tokens) > AWQ_LONGEST_DOCUMENT:
            continue
        kept.append(tokens)
        count += len(tokens)
        if count >= wanted:
            return _consecutive(torch.cat(kept), draw)
    raise draw.too_little(
        f"its documents of at most {AWQ_LONGEST_DOCUMENT} tokens have {count} tokens together", _fitting(draw, count)
    )


def _sequential(draw: _Draw) -> list[Tensor]:
    """Tokenize once without special tokens; sample i is tokens ``[i * seq_len, (i + 1) * seq_len)``."""
    tokens = encode(draw.tokenizer, draw.corpus.joined("\n\n"), special=False)
    if len(tokens) < draw.n_samples * draw.seq_len:
        raise draw.too_little(f"it has {len(tokens)} tokens", _fitting(draw, len(tokens)))
    return _consecutive(tokens, draw)


def _txt_general(draw: _Draw) -> list[Tensor]:
    """Shuffle; of each document that is long enough, the first `seq_len` tokens."""
    samples: list[Tensor] = []
    lengths: list[int] = []
    for text in draw.shuffled():
        tokens = draw.encode(text)
        lengths.append(len(tokens))
        if len(tokens) < draw.seq_len:
            continue
        samples.append(tokens[: draw.seq_len].clone())
        if len(samples) == draw.n_samples:
            return samples
    if not lengths:
        raise empty(draw.corpus.origin)
    fitting = f"set n_samples to {len(samples)} or less" if samples else ""
    if len(lengths) >= draw.n_samples:
        enough = sorted(lengths, reverse=True)[draw.n_samples - 1]
        fitting = f"{fitting} or seq_len to {enough} or less" if fitting else f"set seq_len to {enough} or less"
    raise draw.too_little(
        f"{len(samples)} of its {len(lengths)} documents have that many tokens, the longest has {max(lengths)}",
        fitting or "use a preset that joins the documents",
    )


def _truncated_documents(draw: _Draw) -> list[Tensor]:
    """Shuffle; each document, cut to at most `seq_len` tokens."""
    samples: list[Tensor] = []
    for text in draw.shuffled():
        samples.append(draw.encode(text)[: draw.seq_len].clone())
        if len(samples) == draw.n_samples:
            return samples
    raise _too_few_documents(draw, len(samples))


def _original_txt(draw: _Draw) -> list[Tensor]:
    """Shuffle; each document whole."""
    documents = [text for text in draw.corpus.documents if text.strip()]
    if len(documents) < draw.n_samples:
        raise _too_few_documents(draw, len(documents))
    random.Random(draw.seed).shuffle(documents)
    return [draw.encode(text) for text in documents[: draw.n_samples]]


def _consecutive(tokens: Tensor, draw: _Draw) -> list[Tensor]:
    return [tokens[i * draw.seq_len : (i + 1) * draw.seq_len].clone() for i in range(draw.n_samples)]


def _too_few_documents(draw: _Draw, count: int) -> DataError:
    if count == 0:
        return empty(draw.corpus.origin)
    return draw.too_little(f"it has {count} documents", f"set n_samples to {count} or less")


def _fitting(draw: _Draw, count: int) -> str:
    options = []
    if count >= draw.seq_len:
        options.append(f"n_samples to {count // draw.seq_len} or less")
    if count >= draw.n_samples:
        options.append(f"seq_len to {count // draw.n_samples} or less")
    return f"set {' or '.join(options)}" if options else "take fewer and shorter samples"


@dataclass(frozen=True)
class Preset:
    """A way of sampling.

    Attributes:
        draw: makes the samples.
        joins: works on the whole text joined, so blank lines count and a chat template can't be applied.
        whole_documents: takes no `seq_len`.
        needs_chat: applies the chat template always.
    """

    draw: Callable[[_Draw], list[Tensor]]
    joins: bool = False
    whole_documents: bool = False
    needs_chat: bool = False


PRESETS: Mapping[str, Preset] = {
    "wikitext2_gptq": Preset(partial(_joined_windows, "\n\n"), joins=True),
    "ptb_gptq": Preset(partial(_joined_windows, " "), joins=True),
    "c4_gptq": Preset(_c4_gptq),
    "pileval_awq": Preset(_pileval_awq),
    "pileval_smooth": Preset(_truncated_documents),
    "pileval_omni": Preset(_pileval_omni, joins=True),
    "txt_general_preproc": Preset(_txt_general),
    "random_truncate_txt": Preset(_random_truncate_txt),
    "original_txt": Preset(_original_txt, whole_documents=True),
    "ultrachat_general": Preset(_truncated_documents, needs_chat=True),
    "sequential": Preset(_sequential, joins=True),
}
"""The presets by the names used in configuration files."""
