"""Runs that are killed in the middle, in a child of the test's process: what was replaced there is replaced here."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

import llmc
from llmc.stream.journal import Journal


def killed_after(rows: int, content: dict[str, Any]) -> bool:
    """Run a configuration until it wants to write one more row than so many into its journal.

    Returns:
        Whether it came that far. If it didn't, what it raised has been printed.
    """
    pid = os.fork()
    if pid == 0:
        _run_until(rows, content)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _run_until(rows: int, content: dict[str, Any]) -> None:
    """The child's part, which it doesn't return from."""
    Journal.append = _dying_after(rows)  # type: ignore[method-assign]
    try:
        llmc.compress(content)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _dying_after(rows: int) -> Callable[[Journal, dict[str, Any]], None]:
    """``Journal.append`` that writes so many rows."""
    append, left = Journal.append, iter(range(rows))

    def write_or_die(journal: Journal, row: dict[str, Any]) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        append(journal, row)

    return write_or_die
