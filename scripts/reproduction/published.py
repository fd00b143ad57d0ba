"""Published numbers as data: ``configs/reproduce/published.tsv``."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from llmc.errors import DataError

NOTHING = "-"
"""Stands in a column that has no value: no calibration, nothing left unsaid."""


@dataclass(frozen=True)
class Published:
    """One published perplexity with what is needed to measure it again.

    Attributes:
        id: ``model/method/scheme/text@who``; texts of other protocols than ``gptq 2048`` carry theirs in the name.
        model: as in ``models.toml``, or of a model that no suite runs.
        method: of llmc; ``float`` is the original model.
        scheme: such as ``W4A16g128``; ``W4A4KV4``; ``sparse50%``; ``16`` for the original.
        text: what was evaluated.
        protocol: how, and the tokens in a window: ``gptq 2048``; ``p1 32`` is protocol P1 on its first 32 windows.
        calibration: ``set SAMPLESxLENGTH seed N``; ``-`` where none is needed, ``?`` where the source doesn't say.
        value: the perplexity.
        publisher: who published it, and where.
        source: a paper's or a repository's address.
        unstated: what the source leaves open; ``-`` if nothing.
    """

    id: str
    model: str
    method: str
    scheme: str
    text: str
    protocol: str
    calibration: str
    value: float
    publisher: str
    source: str
    unstated: str

    @property
    def is_complete(self) -> bool:
        """Whether the source says all that is needed to repeat it."""
        return self.unstated == NOTHING


COLUMNS = tuple(field.name for field in fields(Published))


def read_published(file: Path) -> Mapping[str, Published]:
    """All rows by their ids.

    Raises:
        DataError: names the file and the line that can't be read.
    """
    found: dict[str, Published] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise DataError(f"{file}: the columns are {reader.fieldnames}", f"they must be {', '.join(COLUMNS)}")
        for number, row in enumerate(reader, 2):
            one = _row(row, f"{file}, line {number}")
            if one.id in found:
                raise DataError(f"{file}, line {number}: {one.id} stands there twice", "keep one of them")
            found[one.id] = one
    return found


def _row(row: dict[str, str], where: str) -> Published:
    wanting = [name for name in COLUMNS if not (row.get(name) or "").strip()]
    if wanting or None in row:
        raise DataError(f"{where}: {wanting or 'more cells than columns'}", f"write {NOTHING} where there is nothing")
    try:
        value = float(row["value"])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 1):
        raise DataError(f"{where}: value {row['value']} is no perplexity", "a perplexity is a number of 1 or more")
    return Published(**{**row, "value": value})
