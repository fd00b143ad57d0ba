"""Reads a checkpoint unit by unit, each tensor once, the next unit ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO

import torch
from torch import Tensor

from ..errors import CheckpointError
from .headers import TensorEntry
from .memory import own_memory, unheaped

_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)  # torch neither sums nor compares them


class BlockSource:
    """Plain reads into fresh memory: nothing stays mapped, so a unit's memory is gone when its tensors are.

    Args:
        units: the stored tensors of each unit.
        decode: makes dense tensors of a unit's stored ones, which it lets go on the way; None: they are dense.
    """

    def __init__(
        self,
        units: Mapping[str, list[TensorEntry]],
        decode: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> None:
        self._units, self._decode = units, decode
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmc-read")
        self._ahead: dict[str, Future[dict[str, Tensor]]] = {}
        self.bytes_read = 0
        self.reads: dict[str, int] = {}

    def prefetch(self, unit: str) -> None:
        """Start reading a unit in the background."""
        if unit in self._units and unit not in self._ahead:
            self._ahead[unit] = self._pool.submit(self._read, unit)

    def take(self, unit: str) -> dict[str, Tensor]:
        """The unit's tensors by name, on the CPU: decoded, or else in their stored dtype.

        Raises:
            CheckpointError: a file ends early, can't be decoded, or a value is NaN or infinite.
        """
        self.prefetch(unit)
        tensors = self._ahead.pop(unit).result()
        if self._decode is not None:
            tensors = self._decode(tensors)
        check_finite(tensors)
        return tensors

    def close(self) -> None:
        """Stop the background reader."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, unit: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        entries = sorted(self._units[unit], key=lambda entry: (str(entry.file), entry.offset))
        for entry in entries:
            tensors[entry.name] = read_tensor(entry)
            self.bytes_read += entry.nbytes
            self.reads[entry.name] = self.reads.get(entry.name, 0) + 1
        return tensors


def read_tensor(entry: TensorEntry) -> Tensor:
    """A tensor in its stored dtype, on the CPU.

    Raises:
        CheckpointError: its file ends early.
    """
    raw = own_memory(entry.nbytes)
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        if not _fill(file, raw.numpy().data):
            raise CheckpointError(
                f"{entry.file} ends within {entry.name}: it became shorter since the run began",
                "restore the file and run the same command, the run goes on from here",
            )
    return raw.view(entry.dtype).reshape(entry.shape)


def _fill(file: FileIO, target: memoryview) -> bool:
    """Read until ``target`` is full; False if the file ends before."""
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            return False
        done += count
    return True


@unheaped()
def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Stop at NaN or Inf in a weight.

    Raises:
        CheckpointError: names the tensor.
    """
    for name, stored in tensors.items():
        tensor = stored.float() if stored.dtype in _NARROW else stored
        if (
            tensor.is_floating_point()
            and not tensor.sum().isfinite()  # of 16 bits, too, it's summed in float32
            and not tensor.isfinite().all()
        ):
            bad = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{name}: {bad} of {tensor.numel()} values are NaN or infinite",
                "the checkpoint is damaged: download this shard again and run the same command, "
                "the run goes on from here",
            )
