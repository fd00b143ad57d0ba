"""The fenced blocks of the documentation."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "configs" / "data" / "README.md")
_FENCE = re.compile(r'^( *)```(\w*)(?: title="([^"]+)")?[^\n]*\n(.*?)^\1```$', re.S | re.M)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: on which it stands.
        line: of the page, counted from 1.
        language: behind the fence; empty if none.
        title: the file that it is, if it is one.
        text: without the fences.
    """

    page: Path
    line: int
    language: str
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command line, comments left out."""
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def blocks(*languages: str, page: Path | None = None) -> Iterator[Block]:
    """The blocks of all pages, or of one, in their order; of all languages, or of some."""
    for path in PAGES if page is None else (page,):
        text = path.read_text(encoding="utf-8")
        for found in _FENCE.finditer(text):
            if not languages or found[2] in languages:
                line = text.count("\n", 0, found.start()) + 1
                yield Block(path, line, found[2], found[3], found[4])
