"""Runs llmc again and again in children of one process, so that the imports are paid for once, and kills them.

Reads one JSON object a line, answers with one. ``arguments``: those of the command line. ``log``: file for what the
child prints. ``after``: seconds from the first write until SIGKILL. ``boundary``: the child kills itself in front of
its n-th change of the disk, with a part of it done where that can be. ``prepared``: what comes before the first write
is done once, for all runs with the same arguments.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any


class Boundaries:
    """Counts the changes of the disk and ends the process in front of the n-th."""

    def __init__(self, fatal: int | None) -> None:
        self.fatal, self.seen = fatal, 0

    def watch(self, module: Any, name: str, tear: Callable[..., None] | None = None) -> None:
        original = getattr(module, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.reach(lambda: tear(*args) if tear else None)
            return original(*args, **options)

        setattr(module, name, counted)

    def reach(self, tear: Callable[[], None]) -> None:
        self.seen += 1
        if self.seen == self.fatal:
            tear()
            os.kill(os.getpid(), signal.SIGKILL)


def half_a_shard(tensors: Any, path: Path, *_: Any) -> None:
    Path(path).write_bytes(b"\x00" * 100)


def half_a_row(journal: Any, row: dict[str, Any]) -> None:
    with journal._path.open("ab") as file:
        file.write(json.dumps(row).encode()[:-9])


def half_a_copy(source: Path, target: Path) -> None:
    Path(target).write_bytes(Path(source).read_bytes()[:-9])


@cache
def prepared(*arguments: str) -> Any:
    from llmc.algorithms import options_types
    from llmc.cli import parser
    from llmc.config import load_config
    from llmc.prepare import prepare

    given = parser().parse_args(arguments)
    return prepare(load_config(given.config, given.overrides, options_types()))


def child(order: dict[str, Any], begun: int) -> int:
    from gguf import GGUFWriter

    import llmc.prepare
    from llmc.cli import main
    from llmc.stream import files, journal
    from llmc.workspace import Workspace

    def opened(workspace: Workspace, original: Callable[..., Any] = Workspace.open) -> Any:
        os.write(begun, b"!")
        return original(workspace)

    Workspace.open = opened
    if order.get("prepared"):
        ready = prepared(*order["arguments"])
        llmc.prepare.prepare = lambda loaded: ready

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    boundaries = Boundaries(order.get("boundary"))
    boundaries.watch(files, "save_file", half_a_shard)
    boundaries.watch(journal.Journal, "append", half_a_row)
    boundaries.watch(shutil, "copyfile", half_a_copy)
    boundaries.watch(GGUFWriter, "write_tensor_data")
    for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
        boundaries.watch(os, name)
    code = main(order["arguments"])
    print(f"{boundaries.seen} boundaries", flush=True)
    return code


def attempt(order: dict[str, Any]) -> dict[str, Any]:
    if order.get("prepared"):
        prepared(*order["arguments"])
    ready, begun = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = child(order, begun)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(begun)
    handle = os.pidfd_open(pid)
    select.select([ready], [], [])  # it begins to write, or it ends
    started = time.monotonic()
    if not select.select([handle], [], [], order.get("after"))[0]:
        os.kill(pid, signal.SIGKILL)
    os.close(handle)
    os.close(ready)
    _, status = os.waitpid(pid, 0)
    return {
        "killed": os.WIFSIGNALED(status),
        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "seconds": time.monotonic() - started,
    }


def serve() -> None:
    import gc

    import torch

    torch.set_num_threads(1)

    import llmc.algorithms
    import llmc.report.console
    import llmc.run  # noqa: F401

    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(attempt(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
