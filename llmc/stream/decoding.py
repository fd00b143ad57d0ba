"""Between the tensors that a checkpoint stores and the dense ones, one for each parameter, that the rest knows.

Decoders say, from headers and ``config.json`` alone, which dense tensors there will be and of which stored ones each is
made. A unit's stored tensors are read as they are, each once, and decoded when the unit is taken.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .headers import TensorEntry
from .memory import unheaped


class Entry(Protocol):
    """What a header says of a tensor."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        ...


@dataclass(frozen=True)
class DenseEntry:
    """A tensor as the rest of the program sees it.

    Attributes:
        name: unique; the checkpoint's own name where nothing is decoded.
        dtype: its dtype.
        shape: its shape; of a Linear's weight ``[out, in]``.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its length in bytes once it's decoded."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Decoded:
    """Tensors that are made of stored ones; no other is made of those.

    Attributes:
        entries: names, dtypes and shapes of what is made.
        sources: names of what it's made of.
        decode: from those tensors by name to these, in memory of their own. A pure function.
    """

    entries: tuple[DenseEntry, ...]
    sources: tuple[str, ...]
    decode: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Stage:
    """One step of decoding. What isn't a source of anything passes as it is.

    Attributes:
        decoded: what it makes.
        says: what the input was, for people; empty if that's nothing to speak of.
    """

    decoded: tuple[Decoded, ...]
    says: str = ""

    def entries(self, before: Mapping[str, Entry]) -> dict[str, DenseEntry]:
        """What is there behind this stage."""
        taken = {source for one in self.decoded for source in one.sources}
        kept = {name: DenseEntry(name, e.dtype, e.shape) for name, e in before.items() if name not in taken}
        return kept | {entry.name: entry for one in self.decoded for entry in one.entries}

    def sources(self, names: Iterable[str]) -> list[str]:
        """What must be there in front of this stage for these to be there behind it."""
        found = (self._by_name[name].sources if name in self._by_name else (name,) for name in names)
        return list(dict.fromkeys(source for own in found for source in own))

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Decode; ``tensors`` is emptied on the way, so that sources are let go as soon as they're decoded."""
        made: dict[str, Tensor] = {}
        for name in list(tensors):
            one = self._by_source.get(name)
            if one is None:
                made[name] = tensors.pop(name)
            elif name == one.sources[0]:
                made |= _checked(one, one.decode({source: tensors[source] for source in one.sources}))
                for source in one.sources:
                    del tensors[source]
        return made

    @cached_property
    def _by_name(self) -> dict[str, Decoded]:
        return {entry.name: one for one in self.decoded for entry in one.entries}

    @cached_property
    def _by_source(self) -> dict[str, Decoded]:
        return {source: one for one in self.decoded for source in one.sources}


def _checked(one: Decoded, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was promised from the headers."""
    for entry in one.entries:
        tensor = made[entry.name]
        if tensor.shape != entry.shape or tensor.dtype != entry.dtype:
            raise CheckpointError(
                f"{entry.name} decodes to {tensor.dtype} {tuple(tensor.shape)}, where the headers promise "
                f"{entry.dtype} {entry.shape}",
                "fetch the checkpoint again; if that doesn't help, give the original, unquantized one as model.path",
            )
    return made


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's stored tensors and the stages that make dense ones of them.

    Attributes:
        stored: what the files hold.
        stages: in order; none for a plain checkpoint.
    """

    stored: Mapping[str, TensorEntry]
    stages: Sequence[Stage] = ()

    @cached_property
    def entries(self) -> dict[str, DenseEntry]:
        """What the rest of the program sees."""
        entries = {name: DenseEntry(name, entry.dtype, entry.shape) for name, entry in self.stored.items()}
        for stage in self.stages:
            entries = stage.entries(entries)
        return entries

    @property
    def says(self) -> str:
        """What was decoded, for people; empty if nothing that changes values."""
        return "; ".join(stage.says for stage in self.stages if stage.says)

    def sources(self, names: Iterable[str]) -> list[TensorEntry]:
        """What is to be read for dense tensors of these names."""
        wanted = list(names)
        for stage in reversed(self.stages):
            wanted = stage.sources(wanted)
        return [self.stored[name] for name in wanted]

    def units(self, units: Mapping[str, Sequence[str]]) -> dict[str, list[TensorEntry]]:
        """The same for each unit.

        Raises:
            CheckpointError: units share a stored tensor, which would be read twice.
        """
        found = {unit: self.sources(names) for unit, names in units.items()}
        counts = Counter(entry.name for entries in found.values() for entry in entries)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise CheckpointError(
                f"{twice[0]} holds weights of several blocks, which are read one by one",
                "this layout needs a decoder of its own",
            )
        return found

    @unheaped()
    def decode(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors of stored ones, which are let go on the way."""
        for stage in self.stages:
            tensors = stage.run(tensors)
        return tensors


def missing(name: str, scale: str) -> CheckpointError:
    """A quantized weight without what it's multiplied by."""
    return CheckpointError(f"{name} is quantized, and its scales ({scale}) are missing", "is the download complete?")


def misshapen(name: str, shape: Sequence[int], other: str, found: Sequence[int], wanted: str) -> CheckpointError:
    """Scales that don't fit their weight."""
    return CheckpointError(
        f"{name} {list(shape)}: {other} has the shape {list(found)}, and {wanted} is needed",
        "do config.json and the weights belong together? fetch both again",
    )
