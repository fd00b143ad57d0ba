"""Reports as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...stream.files import write_bytes
from ...workspace import REPORT
from .compare import comparison_of
from .plots import draw_plots
from .read import read_run
from .render import render_comparison, render_run
from .sections import page_of

COMPARISON = "comparison.html"


def write_report(folder: Path, target: Path | None = None) -> Path:
    """Write the report of one run, whole or not at all.

    Args:
        folder: the ``save_path`` of the run.
        target: the file; ``report.html`` in the folder by default.

    Returns:
        The file.

    Raises:
        RunError: it is no run, or a damaged one.
    """
    return _write(target or folder / REPORT, render_run(page_of(read_run(folder))))


def compare_runs(folders: Sequence[Path], target: Path | None = None) -> Path:
    """Write the comparison of several runs.

    Args:
        folders: the ``save_path`` of each.
        target: the file; ``comparison.html`` where we are by default.

    Returns:
        The file.

    Raises:
        RunError: one is no run, or a damaged one.
    """
    return _write(target or Path(COMPARISON), render_comparison(comparison_of([read_run(one) for one in folders])))


def report(folders: Sequence[Path], target: Path | None = None, plots: Path | None = None) -> list[Path]:
    """The report of one run or the comparison of several, and their charts as files where ``plots`` names a folder.

    Returns:
        Everything that was written.

    Raises:
        RunError: one is no run, or a damaged one; or charts are wanted and matplotlib isn't installed.
    """
    drawn = [] if plots is None else draw_plots([read_run(folder) for folder in folders], plots)
    page = write_report(folders[0], target) if len(folders) == 1 else compare_runs(folders, target)
    return [page, *drawn]


def finish_report(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The report of a run that has just ended; whatever goes wrong here must not make it fail.

    Returns:
        The file, or None and what went wrong.
    """
    try:
        return write_report(folder), ()
    except Exception as problem:
        return None, (f"report.html wasn't written: {problem}; python -m llmc report {folder} tries again",)


def refresh_report(folder: Path) -> tuple[str, ...]:
    """Write a run's report again, if it has one; whatever goes wrong here must not make what changed the run fail.

    Returns:
        What went wrong.
    """
    return finish_report(folder)[1] if (folder / REPORT).exists() else ()


def _write(target: Path, page: str) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, page.encode())
    return target
