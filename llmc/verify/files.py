"""The files of a folder: each whole, each tensor once, and where the index says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..stream.headers import INDEX_FILE, SINGLE_FILE, TensorEntry, read_file_header, read_index
from .findings import Report

_OTHERS = ("consolidated", "adapter")  # files of other loaders, which nobody looks for in the index
_KILLED = "an export was interrupted here; repeat the command, or remove what it left"
_FETCH = "fetch or export this file again"


@dataclass(frozen=True)
class Stored:
    """The tensors of a folder.

    Attributes:
        entries: where each lies.
        lost: tensors that the index places in files that can't be read, with those files' names.
    """

    entries: Mapping[str, TensorEntry]
    lost: Mapping[str, str]

    def place(self, name: str) -> str:
        """The file that has a tensor, or ought to."""
        return self.entries[name].file.name if name in self.entries else self.lost.get(name, INDEX_FILE)


def read_files(folder: Path, report: Report) -> Stored:
    """Read the headers of all files, and compare them with the index."""
    for leftover in sorted([*folder.glob("*.tmp"), *folder.glob(".unfinished")]):
        report.found(leftover, "", "is what an interrupted export left", _KILLED)
    index = _index(folder, report)
    files = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(_OTHERS)]
    entries: dict[str, TensorEntry] = {}
    bad = set(index.values()) - {file.name for file in files}
    for name in sorted(bad):
        there = [tensor for tensor, file in index.items() if file == name]
        report.found(name, "", f"is missing, with {len(there)} tensors, the first of them {min(there)}", _FETCH)
    for file in files:
        if index and file.name not in index.values():
            report.found(file, "", f"isn't named in {INDEX_FILE}", "remove it, or export the folder again")
            continue
        try:
            found = read_file_header(file)
        except CheckpointError as error:
            bad.add(file.name)
            report.found(file, "", error.message.replace(f"{file} ", "").replace(f"{file}: ", ""), _FETCH)
            continue
        _compare(file, found, index, report)
        for name, entry in found.items():
            if name in entries:
                report.found(file, name, f"is in {entries[name].file.name} too")
            elif not index or name in index:
                entries[name] = entry
    size = sum(entry.nbytes for entry in entries.values())
    report.checked.append(f"files: {len(files)} with {len(entries)} tensors of {size / 1e6:.1f} MB")
    return Stored(entries, {name: file for name, file in index.items() if file in bad})


def _index(folder: Path, report: Report) -> dict[str, str]:
    """The file of each tensor; empty if there is one file, or no usable index."""
    if (folder / INDEX_FILE).is_file():
        try:
            return read_index(folder / INDEX_FILE)
        except CheckpointError as error:
            report.found(INDEX_FILE, "", error.message.replace(f"{folder / INDEX_FILE} ", ""))
    elif not (folder / SINGLE_FILE).is_file():
        report.found(INDEX_FILE, "", "is missing, and so is model.safetensors: nothing says what belongs here", _KILLED)
    return {}


def _compare(file: Path, found: Mapping[str, TensorEntry], index: Mapping[str, str], report: Report) -> None:
    """One file with what the index says of it."""
    if not index:
        return
    for name in sorted(found.keys() - index.keys()):
        report.found(file, name, f"isn't in {INDEX_FILE}, so that no loader sees it")
    for name in sorted(name for name, place in index.items() if place == file.name and name not in found):
        report.found(file, name, f"isn't there, where {INDEX_FILE} places it")
    for name in sorted(name for name in found if index.get(name, file.name) != file.name):
        report.found(file, name, f"is here, but {INDEX_FILE} places it in {index[name]}")
