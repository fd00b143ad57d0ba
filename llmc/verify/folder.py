"""All checks of a folder, one after another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, LlmcError
from ..stream.skeleton import anatomy
from .comparison import Comparison
from .files import read_files
from .findings import Report
from .gguf_file import check_gguf
from .loading import check_loading
from .methods import read_method
from .sidefiles import check_side_files
from .structure import check_structure
from .values import check_values

_CONFIG = "config.json"


def verify(target: Path, against: Path | None = None, *, load: str | None = None, text: Path | None = None) -> Report:
    """Look at a folder, or a GGUF file: its files, its tensors, their values.

    Args:
        target: written by llmc or by others.
        against: a folder with plain weights to compare with: the evaluated model's, or the one that was rounded.
        load: ``transformers`` or ``vllm``: load it too, and let it continue a prompt.
        text: with ``load``: a text to measure the perplexity on.

    Raises:
        LlmcError: there is no model there, or nothing to compare with.
    """
    report = Report(target)
    if target.is_file() and target.suffix == ".gguf":
        check_gguf([target], report)
        return report
    _check_folder(target)
    ggufs = sorted(target.glob("*.gguf"))
    if ggufs:
        check_gguf(ggufs, report)
        if not any(target.glob("*.safetensors")):
            return report
    comparison = None if against is None else Comparison(against)
    _check_tensors(target, report, comparison)
    if against is not None:
        check_side_files(target, against, report)
    if load is not None:
        check_loading(target, load, text, report)
    return report


def _check_folder(target: Path) -> None:
    if not target.is_dir():
        raise CheckpointError(f"{target}: there is no such folder", "name a model's folder, or a .gguf file")
    known = [target / _CONFIG, *target.glob("*.safetensors"), *target.glob("*.gguf"), *target.glob("*.index.json")]
    if not any(path.exists() for path in known):
        inside = [path.name for path in sorted(target.iterdir()) if path.is_dir() and (path / _CONFIG).exists()]
        hint = (
            f"name one of its folders: {', '.join(inside)}" if inside else "name a folder with config.json and weights"
        )
        raise CheckpointError(f"{target} holds no model", hint)


def _check_tensors(folder: Path, report: Report, comparison: Comparison | None) -> None:
    stored = read_files(folder, report)
    if not (folder / _CONFIG).is_file():
        report.found(_CONFIG, "", "is missing: an export writes it last, so this one isn't finished", "finish the run")
        return
    config = _read_config(folder, report)
    if config is None:
        return
    try:
        method, model = read_method(config), anatomy(folder, stored.entries)
    except LlmcError as error:
        report.unjudged = f"{error.message}{f' ({error.remedy})' if error.remedy else ''}"
        return
    structure = check_structure(model, method, stored, report)
    check_values(structure, report, comparison)
    if comparison is not None:
        comparison.judge(report)


def _read_config(folder: Path, report: Report) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        report.found(_CONFIG, "", f"can't be read: {problem}")
        return None
    if not isinstance(content, dict):
        report.found(_CONFIG, "", "isn't an object")
        return None
    return content
