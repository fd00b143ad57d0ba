"""Images with questions and answers, as the model's own processor turns them into its inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmc.data.files import SAMPLES
from llmc.errors import DataError

_PER_TOKEN = ("attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
_SHAPE = '{"image": "cat.jpg", "question": "What is it?", "answer": "A cat."}'


class Processor(Protocol):
    """What llmc uses of a transformers processor."""

    def __call__(self, **options: Any) -> Any:
        """Return a mapping of the model's inputs for ``text`` and ``images``."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Return the conversation as the text that the model was trained on."""


@dataclass(frozen=True)
class ImageTextSpec:
    """What to calibrate with.

    Attributes:
        folder: holds ``samples.json`` and the images.
        n_samples: how many samples, from the first on.
        seq_len: the longest sample, in tokens; longer text is cut. None: nothing is.
        mark: the text that stands for an image in a prompt, where no chat template writes it.
        token: the token in whose places the model puts the image's features.
        apply_chat_template: write each sample as a conversation.
        add_answer: append the answer.
    """

    folder: Path
    n_samples: int
    seq_len: int | None
    mark: str
    token: int
    apply_chat_template: bool = False
    add_answer: bool = False


@dataclass(frozen=True)
class ProcessedSample:
    """One sample: token ids ``[1, tokens]`` int64, and the forward's further inputs by the names of its arguments."""

    tokens: Tensor
    further: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Question:
    """An entry of ``samples.json``; ``place`` says which, for messages."""

    place: str
    images: tuple[Path, ...]
    question: str
    answer: str


def image_text_samples(spec: ImageTextSpec, processor: Processor) -> list[ProcessedSample]:
    """Read and process the first samples of a folder.

    Raises:
        DataError: ``samples.json`` is missing or malformed, holds too few samples, an image is missing or unreadable,
            there is no chat template to apply, or the images don't fit into ``seq_len``.
    """
    questions = _read(spec)
    return [_processed(spec, processor, question) for question in questions]


def _read(spec: ImageTextSpec) -> list[_Question]:
    file = spec.folder / SAMPLES
    if not spec.folder.is_dir():
        raise DataError(f"calib.path: there is no folder {spec.folder}", f"name a folder with {SAMPLES} and images")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{spec.folder} has no {SAMPLES}", f"write one: a list of {_SHAPE}") from None
    except (OSError, ValueError) as problem:
        raise DataError(f"{file} can't be read as JSON: {problem}", f"it must be a list of {_SHAPE}") from problem
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{file} isn't a list of samples", f"it must be a list of {_SHAPE}")
    if len(entries) < spec.n_samples:
        raise DataError(
            f"{file} holds {len(entries)} samples, calib.n_samples is {spec.n_samples}",
            f"set calib.n_samples to {len(entries)}, or add samples",
        )
    return [
        _question(spec, f"{file}, sample {number}", entry) for number, entry in enumerate(entries[: spec.n_samples])
    ]


def _question(spec: ImageTextSpec, place: str, entry: object) -> _Question:
    if not isinstance(entry, dict):
        raise DataError(f"{place} isn't an object", f"it must look like {_SHAPE}")
    if entry.get("audio"):
        raise DataError(f"{place} has audio, which isn't read", "remove it")
    names = entry.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{place}: image is neither a file name nor a list of them", f"write it as in {_SHAPE}")
    images = tuple(spec.folder / name for name in names)
    missing = next((path for path in images if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"{place}: there is no image {missing}", f"mend its name; it's relative to {spec.folder}")
    question, answer = (_text(place, entry, key) for key in ("question", "answer"))
    if not question:
        raise DataError(f"{place} has no question", f"write it as in {_SHAPE}")
    if spec.add_answer and not answer:
        raise DataError(f"{place} has no answer, and calib.add_answer is on", "add it, or set add_answer: False")
    return _Question(place, images, question, answer if spec.add_answer else "")


def _text(place: str, entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{place}: {key} is {type(value).__name__}, not text", f"write it as in {_SHAPE}")
    return value or ""


def _processed(spec: ImageTextSpec, processor: Processor, question: _Question) -> ProcessedSample:
    prompt = _conversation(processor, question) if spec.apply_chat_template else _plain(spec, question)
    images = [_image(question, path) for path in question.images]
    try:
        found = processor(
            text=[prompt],
            images=images or None,
            return_tensors="pt",
            add_special_tokens=not spec.apply_chat_template,  # a template writes them itself
        )
    except Exception as problem:  # each processor trips over something else
        raise DataError(
            f"{question.place}: the model's processor refuses it: {problem}", "mend the sample, or leave it out"
        ) from problem
    inputs = {name: value for name, value in dict(found).items() if isinstance(value, Tensor)}
    tokens = inputs.pop("input_ids").to(torch.int64)
    mask = inputs.get("attention_mask")
    if mask is not None and bool(mask.all()):  # nothing is padded, so it says nothing
        del inputs["attention_mask"]
    if not images:
        return ProcessedSample(_cut(spec, tokens))
    if spec.seq_len is not None and tokens.shape[1] > spec.seq_len:
        _check_images_fit(spec.seq_len, tokens, spec.token, question)
        inputs = {name: _cut(spec, value) if name in _PER_TOKEN else value for name, value in inputs.items()}
    return ProcessedSample(_cut(spec, tokens), inputs)


def _plain(spec: ImageTextSpec, question: _Question) -> str:
    """The images' marks, the question and, if there is one, the answer, a line each."""
    lines = [spec.mark * len(question.images), question.question, question.answer]
    return "\n".join(line for line in lines if line)


def _conversation(processor: Processor, question: _Question) -> str:
    content: list[dict[str, str]] = [{"type": "image"} for _ in question.images]
    turns = [{"role": "user", "content": [*content, {"type": "text", "text": question.question}]}]
    if question.answer:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    try:
        return str(processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=not question.answer))
    except Exception as problem:  # the template is a program from the checkpoint: it may be missing, or raise anything
        raise DataError(
            f"{question.place}: the processor's chat template can't write it: {problem}",
            "set calib.apply_chat_template to false",
        ) from problem


def _image(question: _Question, path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError) as problem:
        raise DataError(f"{question.place}: {path} can't be read as an image: {problem}", "replace it") from problem


def _check_images_fit(seq_len: int, tokens: Tensor, image_token: int, question: _Question) -> None:
    places = (tokens[0] == image_token).nonzero()
    last = int(places.max()) if len(places) else -1
    if last >= seq_len:
        raise DataError(
            f"{question.place}: the images' tokens end at {last + 1}, calib.seq_len is {seq_len}",
            f"set calib.seq_len to {tokens.shape[1]}, or use smaller images or fewer of them",
        )


def _cut(spec: ImageTextSpec, tensor: Tensor) -> Tensor:
    return tensor[:, : spec.seq_len] if spec.seq_len is not None else tensor
