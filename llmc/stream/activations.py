"""Activations between two blocks: in host memory, or in mapped files above a budget."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from torch import Tensor

from .files import write_tensors


class Stream:
    """One hidden state ``[.., tokens, hidden]`` for each batch, overwritten in place block after block."""

    def __init__(self, name: str, batches: Sequence[Tensor]) -> None:
        self.name = name
        self._batches = list(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def load(self, index: int, device: torch.device) -> Tensor:
        """A batch on the device. On the CPU it's the stored tensor itself: don't write to it."""
        return self._batches[index].to(device, non_blocking=True)

    def store(self, index: int, hidden: Tensor) -> None:
        """Overwrite a batch."""
        self._batches[index].copy_(hidden)

    def tensors(self) -> dict[str, Tensor]:
        """All batches by a name that is unique among streams."""
        return {f"{self.name}.{index}": batch for index, batch in enumerate(self._batches)}


class ActivationStore:
    """Allocates streams and saves and restores them all.

    Args:
        folder: for mapped files and checkpoints.
        budget: bytes of host memory; None: half of what is available at the start.
    """

    def __init__(self, folder: Path, budget: int | None) -> None:
        self._folder = folder
        self._left = psutil.virtual_memory().available // 2 if budget is None else budget
        self._mapped = folder / "mapped"
        shutil.rmtree(self._mapped, ignore_errors=True)
        self.streams: dict[str, Stream] = {}

    def add(self, name: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Stream:
        """A new stream, uninitialized. It's mapped to a file if it doesn't fit in what is left of the budget."""
        sizes = [math.prod(shape) for shape in shapes]
        nbytes = sum(sizes) * dtype.itemsize
        if nbytes <= self._left:
            self._left -= nbytes
            batches = [torch.empty(shape, dtype=dtype) for shape in shapes]
        else:
            self._mapped.mkdir(parents=True, exist_ok=True)
            path = self._mapped / f"{name}.bin"
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(nbytes, 1))
            flat = torch.from_file(str(path), shared=True, size=sum(sizes), dtype=dtype)
            batches = [part.view(shape) for part, shape in zip(torch.split(flat, sizes), shapes, strict=True)]
        self.streams[name] = Stream(name, batches)
        return self.streams[name]

    def save(self, file: str) -> None:
        """Write every stream into a new file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for stream in self.streams.values():
            tensors |= stream.tensors()
        write_tensors(self._folder / file, tensors)

    def restore(self, file: str) -> None:
        """Fill every stream from a file that ``save`` wrote."""
        with safe_open(self._folder / file, "pt") as stored:
            for stream in self.streams.values():
                for name, batch in stream.tensors().items():
                    batch.copy_(stored.get_tensor(name))

    def remove(self, file: str) -> None:
        """Delete a file that ``save`` wrote."""
        (self._folder / file).unlink(missing_ok=True)

    def drop_mapped(self) -> None:
        """Remove the mapped files of a finished run."""
        self.streams.clear()
        shutil.rmtree(self._mapped, ignore_errors=True)
