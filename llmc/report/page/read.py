"""From the folder of a run to what is known of it. Reads only: an unfinished run may be going on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import RunError
from ...stream.journal import whole_rows
from ...workspace import METRICS, STATE, SURFACES, is_unfinished
from ..experts import BlockExperts
from ..metrics import SCHEMA
from .data import BlockRow, Evaluation, Experts, Output, Run

_AGAIN = "name the save_path of a run, which holds metrics.json, or .llmc while the run isn't finished"


def read_run(folder: Path) -> Run:
    """A finished run from its ``metrics.json``, an unfinished one from its journal.

    Raises:
        RunError: the folder holds no run, a damaged one, or one that another version of llmc wrote.
    """
    if (folder / METRICS).is_file():
        return _finished(folder, _read_json(folder / METRICS))
    if is_unfinished(folder):
        return _unfinished(folder)
    if not folder.exists():
        raise RunError(f"{folder} doesn't exist", _AGAIN)
    raise RunError(f"{folder} isn't a run of llmc: it has neither {METRICS} nor {STATE}", _AGAIN)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise RunError(f"{file} can't be read: {problem}", _AGAIN) from problem
    if not isinstance(content, dict):
        raise RunError(f"{file} isn't what llmc writes", _AGAIN)
    return content


def _finished(folder: Path, metrics: Mapping[str, Any]) -> Run:
    found = metrics.get("schema")
    if found != SCHEMA:
        raise RunError(
            f"{folder / METRICS} has schema version {found}, this llmc reads version {SCHEMA}",
            "make the report with the llmc that wrote it, or repeat the run",
        )
    return run_of(metrics, folder)


def run_of(metrics: Mapping[str, Any], folder: Path) -> Run:
    """A run from the content of its ``metrics.json``.

    Raises:
        RunError: something in it is missing or of another kind.
    """
    try:
        surfaces = folder / SURFACES
        tokens = {row["unit"]: _expert_tokens(row) for row in metrics["blocks"]}
        return Run(
            name=_name(metrics["config"], folder),
            folder=folder,
            finished=True,
            config=metrics["config"],
            versions=metrics["versions"],
            model=metrics["model"],
            blocks=tuple(BlockRow.of(row) for row in metrics["blocks"]),
            facts=metrics,
            evaluations=tuple(Evaluation.of(entry) for entry in metrics["evaluation"]),
            outputs=tuple(_output(name, output) for name, output in metrics["outputs"].items()),
            experts=tuple(_experts(entry, tokens.get(entry["block"], ())) for entry in metrics["experts"]),
            surfaces=surfaces if surfaces.is_file() else None,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise RunError(f"{folder / METRICS} isn't what this version of llmc writes: {problem!r}", _AGAIN) from problem


def _unfinished(folder: Path) -> Run:
    """What the journal has; configuration and versions stand in the fingerprint."""
    state = folder / STATE
    fingerprint = _read_json(state / "fingerprint.json")
    journal = state / "journal.jsonl"
    rows = whole_rows(journal.read_bytes())[0] if journal.is_file() else []
    blocks = [row for row in rows if row.get("kind") == "unit" and "layers" in row]
    config = json.loads(fingerprint.get("configuration") or "{}")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        finished=False,
        config=config,
        versions=json.loads(fingerprint.get("set of library versions") or "{}"),
        model={},
        blocks=tuple(BlockRow.of(row) for row in blocks),
        experts=tuple(_experts(found.to_dict(), _expert_tokens(row)) for row, found in _counted(blocks)),
    )


def _counted(blocks: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], BlockExperts]]:
    return [(row, found) for row in blocks if (found := BlockExperts.of(row)) is not None]


def _name(config: Mapping[str, Any], folder: Path) -> str:
    saved = (config.get("save") or {}).get("save_path")
    return Path(saved or folder.resolve()).name


def _output(name: str, output: Mapping[str, Any]) -> Output:
    return Output(name, output["folder"], output["bytes"], output["bits_per_weight"], output["serve"])


def _expert_tokens(row: Mapping[str, Any]) -> tuple[int, ...]:
    found = BlockExperts.of(row)
    return () if found is None else tuple(found.tokens[expert] for expert in sorted(found.tokens))


def _experts(entry: Mapping[str, Any], tokens: Sequence[int]) -> Experts:
    counts = entry["tokens"]
    return Experts(
        block=entry["block"],
        count=entry["experts"],
        fewest=counts["fewest"],
        median=counts["median"],
        most=counts["most"],
        scarce=tuple(entry["solved_with_all_tokens"]),
        wanted=entry["wanted"],
        tokens=tuple(tokens),
    )
