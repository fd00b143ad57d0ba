"""Running cells: each in a process of its own, some at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.configuring import load_config
from llmc.errors import ConfigError

from .places import Places
from .suites import Cell, KnownModel

ROOT = Path(__file__).parents[2]
_TAIL = 12  # lines of a failed run's log that are shown

Execute = Callable[[Path, Sequence[str], Path], int]
"""Runs a configuration with overrides, writes what it says into a file, and returns the exit status."""


@dataclass(frozen=True)
class Outcome:
    """What came of a cell.

    Attributes:
        cell: the cell.
        metrics: the run's ``metrics.json``; None if there is none.
        missing: what it lacked to be run, a line each.
        error: the end of a failed run's log.
        seconds: wall time now; 0 for what was finished before.
    """

    cell: Cell
    metrics: Mapping[str, Any] | None = None
    missing: tuple[str, ...] = ()
    error: str = ""
    seconds: float = 0.0


def execute(config: Path, overrides: Sequence[str], log: Path) -> int:
    """Run llmc on a configuration in a process of its own."""
    command = [sys.executable, "-m", "llmc", "--config", str(config)]
    for override in overrides:
        command += ["--set", override]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode


@dataclass(frozen=True)
class Runner:
    """Runs cells into folders of their own.

    Attributes:
        work: holds them.
        places: where models and texts are.
        models: the known models by name.
        resume: keep what is finished, and let unfinished runs go on; if not, everything is done anew.
        settings: overrides that change no result, such as the device.
        execute: how a run is started.
    """

    work: Path
    places: Places
    models: Mapping[str, KnownModel]
    resume: bool = False
    settings: tuple[str, ...] = ()
    execute: Execute = field(default=execute)

    def missing(self, cell: Cell) -> tuple[str, ...]:
        """What a cell lacks to be run."""
        return self._found(cell)[1]

    def run(self, cells: Sequence[Cell], jobs: int = 1) -> Iterator[Outcome]:
        """Run cells, so many at a time, and yield what came of them as they end."""
        with ThreadPoolExecutor(jobs) as pool:
            for done in as_completed([pool.submit(self.run_cell, cell) for cell in cells]):
                yield done.result()

    def run_cell(self, cell: Cell) -> Outcome:
        """Run a cell, or say what it lacks."""
        overrides, missing = self._found(cell)
        if missing:
            return Outcome(cell, missing=missing)
        folder = self.work / cell.id
        overrides += (f"save.save_path={json.dumps(str(folder / 'run'))}",)
        if self.resume and (finished := self._finished(cell, overrides)) is not None:
            return Outcome(cell, finished)
        folder.mkdir(parents=True, exist_ok=True)
        begun = self._file(cell).parent.exists() and not self._file(cell).exists()
        overrides += (f"save.on_existing={'resume' if self.resume and begun else 'overwrite'}",)
        started = time.perf_counter()
        status = self.execute(cell.config, overrides, folder / "log")
        seconds = time.perf_counter() - started
        if status:
            log = (folder / "log").read_text(encoding="utf-8", errors="replace").strip()
            tail = "\n".join(log.splitlines()[-_TAIL:])
            return Outcome(cell, error=f"exit status {status}; {folder / 'log'} ends with\n{tail}", seconds=seconds)
        return Outcome(cell, json.loads(self._file(cell).read_text(encoding="utf-8")), seconds=seconds)

    def _found(self, cell: Cell) -> tuple[tuple[str, ...], tuple[str, ...]]:
        try:
            config = load_config(cell.config, cell.overrides).config
        except ConfigError as error:
            raise ConfigError(f"cell {cell.id}: {error.message}", error.remedy) from error
        found = self.places.find(cell.model, self.models[cell.model], config)
        return (*cell.overrides, *found.overrides, *self.settings), found.missing

    def _file(self, cell: Cell) -> Path:
        return self.work / cell.id / "run" / "metrics.json"

    def _finished(self, cell: Cell, overrides: Sequence[str]) -> Mapping[str, Any] | None:
        """The metrics of a finished run of just this configuration."""
        try:
            metrics: dict[str, Any] = json.loads(self._file(cell).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        wanted = load_config(cell.config, overrides).resolved
        return metrics if _result_keys(metrics.get("config", {})) == _result_keys(wanted) else None


def _result_keys(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration has to do with the numbers."""
    kept = {key: value for key, value in resolved.items() if key not in ("save", "report")}
    plain: dict[str, Any] = json.loads(json.dumps(kept))  # tuples are lists in JSON
    return plain
