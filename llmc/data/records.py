"""Records of a user's own data: what a line may hold, and what is wrong with one that doesn't.

One schema serves every purpose. A line is a JSON object of one of four kinds: a text, a prompt (with the completion
that is expected, or without), a chat, or a question (with its answer, or without). Fields beyond those are left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from llmc.data.files import SAMPLES, decode, parse_json
from llmc.data.tokens import Message
from llmc.errors import DataError

Filled = Annotated[str, StringConstraints(pattern=r"\S")]
"""Text that isn't blank."""

_HELP = "docs/tasks.md has the schema"


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Text(_Model):
    """``{"text": ...}``: plain text to calibrate or to measure perplexity on."""

    kind: ClassVar[str] = "text"
    text: Filled


class Turn(_Model):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Chat(_Model):
    """``{"messages": [{"role": ..., "content": ...}, ...]}``: a conversation."""

    kind: ClassVar[str] = "messages"
    messages: Annotated[tuple[Turn, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _asks(self) -> Chat:
        if all(turn.role != "user" for turn in self.messages):
            raise ValueError("has no turn of the user")
        return self

    @property
    def turns(self) -> list[Message]:
        """Up to what the model is to answer: the last turn of an assistant is an expected answer, and left out."""
        turns = [turn.model_dump() for turn in self.messages]
        return turns[:-1] if turns[-1]["role"] == "assistant" else turns


class Prompt(_Model):
    """``{"prompt": ..., "completion": ...}``: what a model is to continue, and perhaps how."""

    kind: ClassVar[str] = "prompt"
    prompt: Filled
    completion: str | None = None


class Question(_Model):
    """``{"question": ..., "answer": ...}``, as LLMC's ``samples.json`` has it."""

    kind: ClassVar[str] = "question"
    question: Filled
    answer: str | None = None


Record = Text | Chat | Prompt | Question
KINDS: tuple[type[Record], ...] = (Chat, Prompt, Question, Text)
"""In the order in which a record's kind is looked for."""


@dataclass(frozen=True)
class Placed:
    """A record and where it stands: ``prompts.jsonl, line 3``."""

    record: Record
    where: str


@dataclass
class Found:
    """What a file of records holds.

    Attributes:
        file: which.
        records: valid ones, by kind.
        characters: of all their text.
        further: fields that nothing reads, with how many records have them.
        problems: what is wrong, one message each.
    """

    file: Path
    records: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    further: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def record_of(value: object, where: str) -> Record:
    """Check one record.

    Args:
        value: what the JSON holds.
        where: file and line, for the error.

    Raises:
        DataError: names the place, the field and what is wrong with it.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where} is {type(value).__name__}, not an object", 'write {"text": "..."} on each line')
    kind = next((kind for kind in KINDS if kind.kind in value), None)
    if kind is None:
        fields = ", ".join(map(repr, value)) or "none"
        raise DataError(
            f"{where} has none of the fields 'text', 'prompt', 'messages' and 'question'; its fields are {fields}",
            _HELP,
        )
    try:
        return kind.model_validate(value)
    except ValidationError as problem:
        first = problem.errors()[0]
        path = ".".join(map(str, first["loc"])) or kind.kind
        raise DataError(f"{where}: field '{path}' {_what(first)}", _HELP) from problem


def _what(error: Mapping[str, Any]) -> str:
    """What pydantic found, in words that go on from the field's name."""
    kind, value = error["type"], error["input"]
    if kind == "missing":
        return "is missing"
    if kind == "string_type":
        return f"holds {type(value).__name__}, not text"
    if kind == "string_pattern_mismatch":
        return "is blank"
    if kind == "literal_error":
        return f"is {value!r}, not {error['ctx']['expected']}"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    return f"is wrong: {error['msg']}"


def read_records(path: str | Path) -> list[Placed]:
    """All records of a file.

    Args:
        path: ``.jsonl``; ``.json`` with a list, as LLMC's ``samples.json``; ``.txt``, where each line that isn't blank
            is a prompt; or a folder with a ``samples.json``.

    Raises:
        DataError: names the file, the line and the field; or there is no record.
    """
    found = [Placed(record_of(value, where), where) for value, where in _values(_file(path))]
    if not found:
        raise DataError(f"{path} holds no records", "write one on each line")
    return found


def check_records(path: str | Path) -> Found:
    """Look at all records of a file, also behind one that is wrong.

    Raises:
        DataError: the file can't be read, or isn't of a kind that has records.
    """
    found = Found(_file(path))
    for value, where in _values(found.file, found.problems):
        try:
            record = record_of(value, where)
        except DataError as problem:
            found.problems.append(problem.message)
            continue
        found.records[record.kind] += 1
        found.characters += _characters(record)
        if isinstance(value, dict):
            found.further.update(value.keys() - type(record).model_fields.keys())
    return found


def _characters(record: Record) -> int:
    if isinstance(record, Chat):
        return sum(len(turn.content) for turn in record.messages)
    return sum(len(value) for _, value in record if value is not None)


def _file(path: str | Path) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / SAMPLES
    if not file.is_file():
        raise DataError(f"there is no file {file}", "check the path")
    return file


def _values(file: Path, problems: list[str] | None = None) -> Iterator[tuple[object, str]]:
    """Each record's value with its place. What isn't JSON goes to ``problems``, if somebody collects them."""
    kind = file.suffix.lower()
    if kind == ".json":
        values = parse_json(decode(file), file.name)
        if not isinstance(values, list):
            raise DataError(f"{file} isn't a JSON list of objects", 'write [{"question": "..."}, ...]')
        yield from ((value, f"{file.name}, record {number}") for number, value in enumerate(values, 1))
        return
    if kind not in (".jsonl", ".txt"):
        raise DataError(f"{file} is none of .jsonl, .json, .txt", "write one JSON object on each line of a .jsonl file")
    for number, line in enumerate(decode(file).splitlines() if kind == ".txt" else decode(file).split("\n"), 1):
        where = f"{file.name}, line {number}"
        if not line.strip():
            continue
        try:
            yield ({"prompt": line} if kind == ".txt" else parse_json(line, where)), where
        except DataError as problem:
            if problems is None:
                raise
            problems.append(problem.message)
