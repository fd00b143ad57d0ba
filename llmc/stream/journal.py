"""The only truth about what a run has finished: one JSON line for each fact, appended and fsynced."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .files import sync_folder


def whole_rows(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The rows of a journal up to the first torn line, and how many bytes they take."""
    rows, kept = [], 0
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            break
        rows.append(row)
        kept += len(line)
    return rows, kept


class Journal:
    """An append-only file of JSON objects. A line torn by a crash is cut off when the journal is opened again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self._recover()
        else:
            path.touch()
            sync_folder(path.parent)

    def _recover(self) -> None:
        content = self._path.read_bytes()
        self.rows, kept = whole_rows(content)
        if kept < len(content):
            with self._path.open("r+b") as file:
                file.truncate(kept)
                os.fsync(file.fileno())

    def append(self, row: dict[str, Any]) -> None:
        """Add a fact; it's on the disk when this returns."""
        with self._path.open("ab") as file:
            file.write((json.dumps(row) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)

    def unit(self, unit: str) -> dict[str, Any] | None:
        """The row of a finished unit, or None."""
        return next((row for row in self.rows if row["kind"] == "unit" and row["unit"] == unit), None)

    def last(self, kind: str) -> dict[str, Any] | None:
        """The latest row of a kind, or None."""
        return next((row for row in reversed(self.rows) if row["kind"] == kind), None)
