"""Where compressed units go: one shard file for each, and at the very end what makes the folder loadable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file
from torch import Tensor

from ..errors import RunError
from ..models import BlockSelection
from ..quant import UnitRecord
from .files import sha256, write_json, write_tensors
from .memory import unheaped


class UnitFormat(Protocol):
    """The part of an exporter that the engine needs: a pure function of a unit's record, and its inverse."""

    @property
    def name(self) -> str:
        """What the journal calls it."""
        ...

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """Stored tensors of a unit."""
        ...

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        """The record that ``tensors`` was called with."""
        ...


class Sink:
    """A folder of shards, one for each unit, named beforehand so that a resumed run writes the same names.

    Args:
        folder: where the shards go.
        unit_format: what they hold.
        units: all units in order.
        verify: reads a written shard back and raises if it isn't what was to be written.
        selection: which blocks stay. Their tensors are stored under the names that they have in the smaller model;
            records have the original ones. None: all blocks stay.
    """

    def __init__(
        self,
        folder: Path,
        unit_format: UnitFormat,
        units: list[str],
        verify: Callable[[Path, UnitRecord], None],
        selection: BlockSelection | None = None,
    ) -> None:
        self.folder, self.format, self._units, self._verify = folder, unit_format, units, verify
        self._selection = selection

    def shard(self, unit: str) -> Path:
        """The file of a unit."""
        index = self._units.index(unit) + 1
        return self.folder / f"model-{index:05d}-of-{len(self._units):05d}.safetensors"

    def write(self, unit: str, record: UnitRecord) -> dict[str, Any]:
        """Write a unit's shard, whole or not at all; returns what the journal keeps of it."""
        with unheaped():
            tensors = self.format.tensors(record)
            if self._selection is not None:
                tensors = {self._selection.renamed(name): tensor for name, tensor in tensors.items()}
            path = self.shard(unit)
            write_tensors(path, tensors)
            self._verify(path, record)
            return {
                "file": path.name,
                "sha256": sha256(path),
                "bytes": sum(tensor.nbytes for tensor in tensors.values()),
                "weights": record.weights,
                "names": sorted(tensors),
            }

    def read(self, unit: str, written: dict[str, Any]) -> UnitRecord:
        """Read a unit back.

        Raises:
            RunError: the file isn't the one that the journal speaks of.
        """
        path = self.folder / written["file"]
        if not path.exists() or sha256(path) != written["sha256"]:
            raise RunError(
                f"{path} is missing or isn't what the interrupted run wrote",
                "start over with --set save.on_existing=overwrite",
            )
        return self.load(unit)

    def load(self, unit: str) -> UnitRecord:
        """The record of a unit's shard, whoever wrote it.

        Raises:
            FileNotFoundError: there is none.
            SafetensorError: it's damaged.
        """
        stored = load_file(self.shard(unit))
        if self._selection is not None:
            stored = {self._selection.original(name): tensor for name, tensor in stored.items()}
        return self.format.read(stored)

    def write_index(self, rows: list[dict[str, Any]]) -> None:
        """Write the index of all shards from the journal's unit rows."""
        parts = [row["outputs"][self.format.name] for row in rows]
        write_json(
            self.folder / "model.safetensors.index.json",
            {
                "metadata": {"total_size": sum(part["bytes"] for part in parts)},
                "weight_map": {name: part["file"] for part in parts for name in part["names"]},
            },
        )
