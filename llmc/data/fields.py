"""Which of a record's fields is its text, and how one record is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from llmc.data.tokens import Message
from llmc.errors import DataError

Render = Callable[[Sequence[Message]], str]
"""Writes a conversation as text; given when the chat template is to be applied."""

_TEXT_FIELDS = ("text", "sentence", "content", "question", "prompt")
_CHAT_FIELD = "messages"


@dataclass(frozen=True)
class TextField:
    """How a record becomes a text.

    Attributes:
        name: the field read; beside ``question`` an ``answer`` is read too, where there is one.
        render: None for plain text; else each record is made a conversation and written by this function.
    """

    name: str
    render: Render | None

    @property
    def columns(self) -> tuple[str, ...]:
        """Every field that ``read`` looks at."""
        return (self.name, "answer") if self.name == "question" else (self.name,)

    def read(self, record: Mapping[str, Any], where: str) -> str:
        """Return the record's text ("" for a null one).

        Args:
            record: field name -> value.
            where: file and line, for the error.

        Raises:
            DataError: the field is missing here or holds something else than text (or turns of a chat).
        """
        if self.name not in record:
            raise DataError(
                f"{where} has no field '{self.name}'; its fields are {_listed(record)}",
                "give every record the same fields, or name the field with calib.text_field",
            )
        value = record[self.name]
        if self.render is not None and isinstance(value, list):
            return self.render(self._turns(value, where))
        question = self._text(value, where)
        answer = self._text(record.get("answer"), where) if self.name == "question" else ""
        if self.render is None:
            return f"{question}\n{answer}" if answer else question
        turns: list[Message] = [{"role": "user", "content": question}]
        if answer:
            turns.append({"role": "assistant", "content": answer})
        return self.render(turns) if question.strip() else ""

    def _text(self, value: object, where: str) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        raise DataError(
            f"{where}: the field '{self.name}' holds {type(value).__name__}, not text",
            "write the text as a JSON string, or name another field with calib.text_field",
        )

    def _turns(self, value: list[Any], where: str) -> list[Message]:
        if all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in value):
            return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in value]
        raise DataError(
            f"{where}: the field '{self.name}' is not a list of turns with 'role' and 'content'",
            'write it as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
        )


def choose_field(fields: Sequence[str], wanted: str | None, render: Render | None, origin: str) -> TextField:
    """Find the field that holds the text.

    The one asked for; else ``messages`` where a chat template is applied; else the first of text, sentence, content,
    question, prompt; else the only field there is.

    Args:
        fields: the names that the records have.
        wanted: the name in the configuration, if one was given.
        render: see `TextField`.
        origin: the file or data set, for the error.

    Raises:
        DataError: none fits. The message lists the fields there are.
    """
    if wanted is not None:
        if wanted in fields:
            return TextField(wanted, render)
        raise DataError(f"{origin} has no field '{wanted}'; its fields are {_listed(fields)}", "name one of these")
    if render is not None and _CHAT_FIELD in fields:
        return TextField(_CHAT_FIELD, render)
    for name in _TEXT_FIELDS:
        if name in fields:
            return TextField(name, render)
    if len(fields) == 1 and fields[0] != _CHAT_FIELD:
        return TextField(fields[0], render)
    remedy = "name the field that holds the text with text_field"
    if _CHAT_FIELD in fields:
        remedy = "set calib.apply_chat_template to true (or preproc to ultrachat_general) to use 'messages'"
    raise DataError(f"{origin} has no field that is known to hold text; its fields are {_listed(fields)}", remedy)


class Rows(Sequence[str]):
    """Texts of records that are read one by one when asked for: a data set larger than memory stays on disk."""

    def __init__(self, records: Any, field: TextField, origin: str) -> None:
        """Wrap `records`: anything with ``len`` and ``[int] -> mapping``."""
        self._records = records
        self._field = field
        self._origin = origin

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Read one text, or the texts of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._field.read(self._records[index], f"{self._origin}, record {index % len(self) + 1}")


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "none"
