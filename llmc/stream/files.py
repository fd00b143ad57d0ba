"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_UNFINISHED = ".unfinished"


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (renames, new files) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def place(written: Path, target: Path) -> None:
    """Give a written file its name, such that both survive a power cut."""
    handle = os.open(written, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    written.replace(target)
    sync_folder(target.parent)


def write_bytes(target: Path, content: bytes) -> None:
    """Write, fsync, rename, fsync the folder: ``target`` never holds a part."""
    written = target.with_name(target.name + ".tmp")
    written.write_bytes(content)
    place(written, target)


def write_json(target: Path, value: Any) -> None:
    """The same for JSON."""
    write_bytes(target, (json.dumps(value, indent=2) + "\n").encode())


def write_tensors(target: Path, tensors: Mapping[str, Tensor]) -> None:
    """The same for a safetensors file.

    safetensors writes a file of another name first, and leaves it there when it's killed. So it writes into a folder
    beside the target that begins and ends empty.
    """
    remove_unfinished(target.parent)
    folder = target.parent / _UNFINISHED
    folder.mkdir()
    written = folder / target.name
    # safetensors makes files that only their owner may read; a server may run as somebody else.
    written.touch()
    mode = written.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, written, metadata={"format": "pt"})
    written.chmod(mode)
    place(written, target)
    folder.rmdir()


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run was about to write there."""
    shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()


def sha256(path: Path) -> str:
    """Digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
