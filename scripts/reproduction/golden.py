"""Golden numbers: what llmc itself measured before, so that no change of a result goes unnoticed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

GOLDEN = "golden.json"


@dataclass(frozen=True)
class Golden:
    """A number and the tokens that it was measured on.

    Attributes:
        value: the perplexity.
        tokens_sha256: digest of the evaluated token ids: a number on other tokens is another number.
    """

    value: float
    tokens_sha256: str


def golden_key(cell: str, position: str, text: str) -> str:
    """What a number is kept under."""
    return f"{cell}/{position}/{text}"


def read_golden(folder: Path) -> dict[str, Golden]:
    """A suite's golden numbers; none if it hasn't got any."""
    file = folder / GOLDEN
    if not file.is_file():
        return {}
    return {key: Golden(**one) for key, one in json.loads(file.read_text(encoding="utf-8")).items()}


def write_golden(folder: Path, numbers: Mapping[str, Golden]) -> None:
    """Replace the numbers that were measured, and keep those that weren't."""
    merged = {**read_golden(folder), **numbers}
    content = {key: asdict(merged[key]) for key in sorted(merged)}
    (folder / GOLDEN).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
