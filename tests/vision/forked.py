"""Runs that are killed in the middle: children of a process of their own, in which no thread has been started yet, so
that it may be forked.

As a program it reads an order and answers with a list of booleans. ``name``: the family whose samples calibrate.
``content``: the configuration. ``rows``: of each run, how many rows of the journal it writes before it's killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any


def killed_after(rows: Sequence[int], name: str, content: dict[str, Any]) -> list[bool]:
    """Run a configuration again and again, each time until it wants to write one more row than so many into its
    journal.

    Returns:
        Of each run, whether it came that far. If it didn't, what it raised has been printed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    order = json.dumps({"name": name, "content": content, "rows": list(rows)})
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=order, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    answer: list[bool] = json.loads(done.stdout)
    return answer


def serve() -> None:
    import torch

    torch.set_num_threads(1)

    import llmc.algorithms
    import llmc.run  # noqa: F401

    order = json.load(sys.stdin)
    print(json.dumps([_killed(rows, order["name"], order["content"]) for rows in order["rows"]]))


def _killed(rows: int, name: str, content: dict[str, Any]) -> bool:
    pid = os.fork()
    if pid == 0:
        _run_until(rows, name, content)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _run_until(rows: int, name: str, content: dict[str, Any]) -> None:
    """The child's part, which it doesn't return from."""
    try:
        os.dup2(2, 1)  # the answer has the way out for itself
        from tiny_vision import mixed_samples

        import llmc.prepare
        from llmc.stream.journal import Journal

        Journal.append = _dying_after(rows, Journal.append)  # type: ignore[method-assign]
        llmc.prepare.calibration = lambda *_: mixed_samples(name)
        llmc.compress(content)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _dying_after(rows: int, append: Callable[..., None]) -> Callable[..., None]:
    """``Journal.append`` that writes so many rows."""
    left = iter(range(rows))

    def write_or_die(journal: Any, row: dict[str, Any]) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        append(journal, row)

    return write_or_die


if __name__ == "__main__":
    serve()
