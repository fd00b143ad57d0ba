"""The folder of a run: who may write into it, what is in it, and how it's finished."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .budget.sensitivity import FILE
from .errors import ExportError, RunError
from .export import EXPORTERS, Exporter, Layer, Source, copy_side_files
from .stream.files import place, remove_unfinished, sync_folder, write_json
from .stream.journal import Journal
from .stream.sink import Sink

STATE = ".llmc"
METRICS = "metrics.json"
REPORT = "report.html"
SURFACES = "surfaces.safetensors"
CLUSTERS = "clusters.json"
_FINGERPRINT = "fingerprint.json"
CONFIG = "config.json"
_OURS = {STATE, METRICS, REPORT, SURFACES, CLUSTERS, *(exporter.folder for exporter in EXPORTERS)}

OnExisting = Literal["fail", "overwrite", "resume"] | None


def tokens_digest(samples: Sequence[Tensor]) -> str:
    """SHA-256 over the shapes and ids of token tensors, and the values of what comes with them."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(tuple(sample.shape)).encode())
        exact = torch.float64 if sample.is_floating_point() else torch.int64
        digest.update(sample.contiguous().to(exact).numpy().tobytes())
    return digest.hexdigest()


def _difference(what: str, earlier: str | None, now: str) -> str:
    """What differs, in words; empty if nothing does. Of a JSON object, the keys whose values differ."""
    if earlier == now:
        return ""
    keys = _differing_keys(json.loads(earlier), json.loads(now)) if earlier and now.startswith("{") else []
    return f"{what} ({', '.join(keys)})" if keys else what


def _differing_keys(left: Any, right: Any, path: str = "") -> list[str]:
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        left, right = dict(enumerate(left)), dict(enumerate(right))
    if not isinstance(left, dict) or not isinstance(right, dict):
        return [] if left == right else [path]
    keys = [*left, *(key for key in right if key not in left)]
    below = [_differing_keys(left.get(key), right.get(key), f"{path}.{key}".lstrip(".")) for key in keys]
    return [key for found in below for key in found]


def is_unfinished(path: Path) -> bool:
    """Whether a folder holds a run that is to be gone on with."""
    return (path / STATE / _FINGERPRINT).exists()


class Workspace:
    """``save_path`` during a run.

    Args:
        path: the folder.
        on_existing: what to do if it holds something; ``add`` an output to what a finished run wrote.
        fingerprint: named digests of everything that the result depends on.
    """

    def __init__(self, path: Path, on_existing: OnExisting | Literal["add"], fingerprint: Mapping[str, str]) -> None:
        self.path, self.state = path, path / STATE
        self._fingerprint = dict(fingerprint)
        self._clear = on_existing == "overwrite"
        if path.exists() and not path.is_dir():
            raise RunError(f"save.save_path: {path} is a file", "name a folder")
        content = {entry.name for entry in path.iterdir()} if path.exists() else set()
        content -= {FILE}  # measured on its own, perhaps for this very run
        if self._clear:
            self._check_only_ours(content)
        elif content and on_existing != "add":
            self._check_resumable(content, on_existing)

    def _check_only_ours(self, content: set[str]) -> None:
        foreign = sorted(content - _OURS)
        if foreign:
            raise RunError(
                f"save.save_path: {self.path} holds {foreign[0]}, which isn't llmc's, so it won't be overwritten",
                "choose another folder, or move it away",
            )

    def _check_resumable(self, content: set[str], on_existing: OnExisting) -> None:
        known = self.state / _FINGERPRINT
        if on_existing == "fail":
            raise RunError(f"save.save_path: {self.path} isn't empty", "choose another folder, or set save.on_existing")
        if not known.exists():
            if content <= {STATE}:
                return  # killed before the run had begun
            if METRICS in content:
                shutil.rmtree(self.state, ignore_errors=True)  # killed while the finished run forgot it
            what = "a finished run" if METRICS in content else f"{sorted(content)[0]} and no unfinished run"
            raise RunError(
                f"save.save_path: {self.path} holds {what}",
                "choose another folder, or start over with --set save.on_existing=overwrite",
            )
        earlier: dict[str, str] = json.loads(known.read_text())
        differing = [_difference(key, earlier.get(key), now) for key, now in self._fingerprint.items()]
        differing = [text for text in differing if text]
        if differing:
            raise RunError(
                f"save.save_path: {self.path} holds an unfinished run with another {' and another '.join(differing)}",
                "restore that, choose another folder, or start over with --set save.on_existing=overwrite",
            )

    def taken(self) -> int:
        """Bytes on the disk that an earlier run's files take, which this one needs not again."""
        files = [file for name in _OURS for file in (self.path / name, *(self.path / name).rglob("*"))]
        return sum(file.stat().st_size for file in files if file.is_file())

    def open(self) -> Journal:
        """Begin, or go on. The first thing that a run writes.

        Raises:
            RunError: the folder can't be written.
        """
        try:
            if self._clear and self.path.exists():
                self._forget()
                for name in _OURS:
                    entry = self.path / name
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
            self.state.mkdir(parents=True, exist_ok=True)
            if not (self.state / _FINGERPRINT).exists():
                write_json(self.state / _FINGERPRINT, self._fingerprint)
            return Journal(self.state / "journal.jsonl")
        except OSError as problem:
            raise RunError(
                f"save.save_path: {self.path} can't be written: {problem.strerror or problem}",
                "choose another folder, or mend its permissions",
            ) from problem

    def _forget(self) -> None:
        """Remove the state. Without a fingerprint, whatever is left when we are killed is never gone on with."""
        (self.state / _FINGERPRINT).unlink(missing_ok=True)
        if self.state.exists():
            sync_folder(self.state)
            shutil.rmtree(self.state)

    def shards(self, exporter: Exporter) -> Path:
        """Where the units of an output are written. Mere parts of a file stay in the state, and go with it."""
        return (self.state / "parts" if exporter.assembled else self.path) / exporter.folder

    def finish_output(
        self,
        exporter: Exporter,
        sink: Sink,
        source: Source,
        original: dict[str, Any],
        layers: list[Layer],
        rows: list[dict[str, Any]],
    ) -> dict[str, Any]:
        """Make a folder loadable: side files, index or assembled file, and at the very end ``config.json``.

        ``original`` is the configuration of the model that was stored, before its exporter has its say.

        Returns:
            Its folder, size, bits per weight of the model (whole files of weights) and number of tensors.

        Raises:
            ExportError: a tensor of the original is missing.
        """
        folder = self.path / exporter.folder
        folder.mkdir(exist_ok=True)
        remove_unfinished(folder)
        if exporter.stores_weights:
            copy_side_files(source.folder, folder)
        written = [row["outputs"][exporter.name] for row in rows]
        names = {name for part in written for name in part["names"]}
        missing = [layer.name for layer in layers if not exporter.parts(layer.name, names)]
        if missing:
            raise ExportError(f"{folder}: nothing was written for {missing[0]}", "please report this")
        files = parts = [sink.folder / part["file"] for part in written]
        gone = [file for file in parts if not file.is_file()]
        if gone:
            raise ExportError(f"{gone[0]} was written and is gone", "start over with --set save.on_existing=overwrite")
        count = len(names)
        if exporter.assembled is None:
            sink.write_index(rows)
        else:
            whole, unfinished = folder / exporter.assembled, folder / f"{exporter.assembled}.tmp"
            count = exporter.assemble(parts, source, unfinished)
            place(unfinished, whole)
            files = [whole]
        for name, content in exporter.extra_files(original, layers).items():
            write_json(folder / name, content)
        if exporter.stores_weights:
            write_json(folder / CONFIG, exporter.config(original, layers))
        sync_folder(folder)
        bits = 8 * sum(file.stat().st_size for file in files) / sum(part["weights"] for part in written)
        return {
            "folder": str(folder),
            "bytes": sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file()),
            "bits_per_weight": bits if exporter.stores_weights else None,
            "tensors": count,
            "serve": exporter.serve(folder),
        }

    def finish(self, metrics: Mapping[str, Any], clusters: Mapping[str, Any]) -> None:
        """Write ``metrics.json`` and forget how we got here.

        ``clusters`` are those of each block, by its unit, where tensors inside it are rounded by clusters of channels:
        no format stores them, and without them the model can't be gone through again.
        """
        if clusters:
            write_json(self.path / CLUSTERS, {"schema": 1, "blocks": clusters})
        write_json(self.path / METRICS, metrics)
        self._forget()
        sync_folder(self.path)
