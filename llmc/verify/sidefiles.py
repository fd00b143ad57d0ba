"""Tokenizer, templates and generation settings: byte for byte those of the other folder."""

from __future__ import annotations

from pathlib import Path

from .findings import Report

_STARTS = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "generation_config")
_SUFFIXES = (".model", ".jinja", ".tiktoken")
_COPY = "copy it from there"


def check_side_files(folder: Path, model: Path, report: Report) -> None:
    """Report those that are missing or differ."""
    files = [file for file in sorted(model.iterdir()) if file.is_file() and _matters(file)]
    for file in files:
        mine = folder / file.name
        if not mine.is_file():
            report.found(mine, "", f"is missing, and {model} has it", _COPY)
        elif mine.read_bytes() != file.read_bytes():
            report.found(mine, "", f"differs from that in {model}", _COPY)
    report.checked.append(f"side files: {len(files)} compared byte for byte")


def _matters(file: Path) -> bool:
    return file.name.startswith(_STARTS) or file.suffix in _SUFFIXES
