"""Text from local files: .txt, .jsonl, .json, .parquet, a folder of them, or a fraction of one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.data.fields import Render, Rows, TextField, choose_field
from llmc.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
SAMPLES = "samples.json"

_FRACTION = re.compile(r"^(?P<path>.*)#(?P<start>\d*\.?\d*):(?P<stop>\d*\.?\d*)$", re.DOTALL)


@dataclass(frozen=True)
class Corpus:
    """Text in the two views that the presets need.

    Attributes:
        texts: what is joined into one string: the whole of a .txt file, or every record (blank ones too, because
            the public protocols join those as well).
        documents: what is drawn from one by one: the lines of a .txt file, or the records. May hold blanks.
        origin: what it is, for messages and for the protocol's description; no folders of this machine.
        is_local: a local file, as opposed to one of the public sets.
        is_rendered: the chat template was applied, which writes the special tokens itself.
    """

    texts: Sequence[str]
    documents: Sequence[str]
    origin: str
    is_local: bool
    is_rendered: bool = False

    def joined(self, separator: str) -> str:
        """Return all the text as one string.

        Raises:
            DataError: there is nothing but white space.
        """
        text = separator.join(self.texts)
        if not text.strip():
            raise empty(self.origin)
        return text


@dataclass(frozen=True)
class PathFraction:
    """A path with an optional ``#start:stop`` suffix, fractions of the file between 0 and 1.

    ``corpus.txt#0:0.5`` and ``corpus.txt#0.5:1`` are disjoint and together the whole: so one file can serve for
    calibration and for evaluation. A text file is cut at line ends, a data set between records.
    """

    path: Path
    start: float = 0.0
    stop: float = 1.0

    @classmethod
    def parse(cls, text: str) -> PathFraction:
        """Read ``path`` or ``path#start:stop``; an omitted bound is 0 or 1. A file that has '#' in its name wins.

        Raises:
            DataError: the bounds aren't ``0 <= start < stop <= 1``.
        """
        match = _FRACTION.match(text)
        if match is None or Path(text).expanduser().exists():
            return cls(Path(text).expanduser())
        try:
            start, stop = float(match["start"] or 0), float(match["stop"] or 1)
        except ValueError:  # a lone "."
            start, stop = 1.0, 0.0
        if not 0 <= start < stop <= 1:
            raise DataError(
                f"'#{match['start']}:{match['stop']}' in {text} isn't a range of fractions",
                "write two numbers with 0 <= start < stop <= 1, as in corpus.txt#0:0.5",
            )
        return cls(Path(match["path"]).expanduser(), start, stop)

    @property
    def label(self) -> str:
        """The file's name and the fraction, without folders."""
        whole = (self.start, self.stop) == (0.0, 1.0)
        return self.path.name if whole else f"{self.path.name}#{self.start:g}:{self.stop:g}"

    def cut_text(self, text: str) -> str:
        """Return this fraction of a text: each bound moves forward to the next line's start."""
        return text[_line_start(text, self.start) : _line_start(text, self.stop)]

    def row_range(self, count: int) -> range:
        """Return this fraction of ``range(count)``."""
        return range(round(self.start * count), round(self.stop * count))


def load_file(fraction: PathFraction, wanted: str | None, render: Render | None) -> Corpus:
    """Read one text file or data file.

    Args:
        fraction: the file, and the part of it.
        wanted: the field that holds the text, for files with records; None to find it.
        render: applies the chat template; None for plain text.

    Raises:
        DataError: unreadable, undecodable (says where), malformed (says which line), or without a text field.
    """
    suffix, origin = fraction.path.suffix.lower(), fraction.label
    if suffix == ".txt":
        text = fraction.cut_text(decode(fraction.path))
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        if render is not None:
            field = TextField("text", render)
            lines = [field.read({"text": line}, origin) for line in lines]
        return Corpus([text] if render is None else lines, lines, origin, True, render is not None)
    if suffix == ".jsonl":
        texts: Sequence[str] = _jsonl_texts(fraction, wanted, render)
    elif suffix in (".json", ".parquet"):
        records, fields = (_json_records if suffix == ".json" else _parquet_records)(fraction.path)
        kept = [records[i] for i in fraction.row_range(len(records))]
        texts = Rows(kept, choose_field(fields, wanted, render, origin), origin)[:] if kept else []
    else:
        raise DataError(f"{fraction.path} is none of {', '.join(SUFFIXES)}", "convert it to .txt or .jsonl")
    return Corpus(texts, texts, origin, True, render is not None)


def load_folder(fraction: PathFraction, wanted: str | None, render: Render | None) -> Corpus:
    """Read a folder: its ``samples.json`` if there is one, else all its text and data files in the order of names.

    Raises:
        DataError: no such file in the folder, or one of them is at fault.
    """
    folder = fraction.path
    if (folder / SAMPLES).is_file():
        files = [folder / SAMPLES]
    else:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
    if not files:
        raise DataError(
            f"the folder {folder} holds no {SAMPLES}, no .txt, .jsonl, .json or .parquet file and no saved data set",
            "put text files into it, or save a data set there with datasets' save_to_disk",
        )
    parts = [load_file(PathFraction(file, fraction.start, fraction.stop), wanted, render) for file in files]
    texts = [text for part in parts for text in part.texts]
    documents = [text for part in parts for text in part.documents]
    return Corpus(texts, documents, fraction.label, True, render is not None)


def empty(origin: str) -> DataError:
    """Make the error for text that is nothing but white space."""
    return DataError(f"{origin} holds no text", "give a file (or a fraction of one) that has some")


def _line_start(text: str, fraction: float) -> int:
    position = round(fraction * len(text))
    if position in (0, len(text)) or text[position - 1] == "\n":
        return position
    end = text.find("\n", position)
    return len(text) if end < 0 else end + 1


def decode(file: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        DataError: it can't be read, or isn't UTF-8.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"can't read {file}: {error.strerror}", "check the path and its permissions") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        skipped = len(data) - len(error.object)  # the byte order mark, if there was one
        at = error.start + skipped
        line = data.count(b"\n", 0, at) + 1
        raise DataError(
            f"{file} isn't UTF-8: byte 0x{data[at]:02x} at offset {at}, in line {line}",
            "save the file as UTF-8 text",
        ) from error


def _jsonl_texts(fraction: PathFraction, wanted: str | None, render: Render | None) -> list[str]:
    whole = decode(fraction.path)
    part = fraction.cut_text(whole)
    first = whole.count("\n", 0, _line_start(whole, fraction.start)) + 1
    field: TextField | None = None
    texts = []
    for number, line in enumerate(part.split("\n"), first):
        if not line.strip():
            continue
        where = f"{fraction.path.name}, line {number}"
        record = parse_json(line, where)
        if not isinstance(record, dict):
            raise DataError(f"{where} is {type(record).__name__}, not an object", 'write {"text": "..."} on each line')
        field = field or choose_field(list(record), wanted, render, fraction.path.name)
        texts.append(field.read(record, where))
    return texts


def _json_records(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    records = parse_json(decode(file), file.name)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{file} isn't a JSON list of objects", 'write [{"question": "...", "answer": "..."}, ...]')
    return records, list(records[0]) if records else []


def parse_json(text: str, where: str) -> Any:
    """The value that a JSON text holds; ``where`` is for the error.

    Raises:
        DataError: it isn't JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if "\n" in text else ""
        raise DataError(
            f"{where} isn't valid JSON: {error.msg} at {place}column {error.colno}",
            "mend it there; a .jsonl file has one JSON object on each line",
        ) from error


def _parquet_records(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(file)
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"can't read {file} as parquet: {error}", "write the file anew") from error
    return table.to_pylist(), table.column_names
