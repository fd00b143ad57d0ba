"""What stands in front of the blocks, where an earlier pass has compressed a part of it: the blocks of an encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models import Subset
from ..quant import QWeight, UnitRecord
from .blockwork import BlockWork, WorkContext
from .journal import Journal
from .sink import Sink
from .skeleton import EMBED, HEAD, Skeleton, block_unit

_OF_THE_ORIGINAL = (".original", ".pretrain")


def encoder_of(skeleton: Skeleton, path: str, others: Sequence[str] = ()) -> Skeleton:
    """The same empty model with a list of the encoder's blocks as its blocks.

    What is needed to get to them stands in front; what is behind them, the language blocks among it, is in no unit.

    Args:
        skeleton: the whole model, whose language blocks are its blocks.
        path: dotted path of the list.
        others: those of the encoder's other lists.
    """
    encoder = copy(skeleton)
    blocks = skeleton.model.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(f"{path} is a {type(blocks).__name__}, not a list of blocks")
    encoder.path, encoder.blocks, encoder.is_encoder = path, blocks, True
    encoder.units = {unit: [] for unit in (EMBED, HEAD, *map(block_unit, range(len(blocks))))}
    apart = tuple(f"{other}." for other in others)
    for name in skeleton.units[EMBED]:
        parameter = skeleton.parameter_of[name]
        if parameter.startswith(f"{path}."):
            encoder.units[block_unit(int(parameter[len(path) + 1 :].split(".")[0]))].append(name)
        elif not parameter.startswith(apart):
            encoder.units[EMBED].append(name)
    return encoder


@dataclass(frozen=True)
class CompressedBlocks:
    """A list of an encoder's blocks behind the pass that compressed them.

    Attributes:
        encoder: the list as the blocks of a model.
        work: what was done to every block.
        subsets: of every block.
        sink: holds their records.
        journal: has a row for each.
    """

    encoder: Skeleton
    work: WorkContext
    subsets: tuple[Subset, ...]
    sink: Sink
    journal: Journal

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(self.encoder.blocks)

    def record(self, index: int) -> UnitRecord:
        """A block as it's to be stored.

        Raises:
            RunError: its file isn't what the pass wrote.
        """
        unit = block_unit(index)
        row = self.journal.unit(unit)
        if row is None:
            raise ValueError(f"{self.encoder.path}.{index} hasn't been compressed")
        return self.sink.read(unit, row["outputs"][self.sink.format.name])

    def put(self, index: int, stored: Mapping[str, tuple[str, torch.dtype]]) -> BlockWork:
        """Give a loaded block its compressed weights, and its Linears what rounds their inputs.

        Args:
            index: which.
            stored: for each parameter, by the model's name, the checkpoint's name and dtype.
        """
        path, block = f"{self.encoder.path}.{index}", self.encoder.blocks[index]
        work = BlockWork(self.work, self.subsets, index, block, path, stored)
        work.restore(self.record(index), self.journal.unit(block_unit(index)) or {})
        return work


class CompressedFront:
    """The unit in front of the blocks with the compressed blocks of an encoder in it.

    Args:
        skeleton: the whole model.
        lists: the compressed ones; none leave everything as it is.
    """

    def __init__(self, skeleton: Skeleton, lists: Sequence[CompressedBlocks] = ()) -> None:
        self._skeleton, self._lists = skeleton, lists

    def record(self, plain: dict[str, Tensor]) -> UnitRecord:
        """The unit as it's to be stored, given all its tensors before that."""
        kept, quantized = dict(plain), dict[str, QWeight]()
        for blocks in self._lists:
            for index in range(blocks.count):
                found = blocks.record(index)
                for name in blocks.encoder.units[block_unit(index)]:
                    del kept[name]
                kept |= found.plain
                quantized |= found.quantized
        return UnitRecord(plain=kept, quantized=quantized)

    def by_encoder(self, streams: Iterable[str], weights: Mapping[str, Tensor]) -> Iterator[tuple[list[str], bool]]:
        """Streams by the encoder that makes their image features: first those of the original's, then, with it in the
        place of that, the compressed one's (``True``).

        Args:
            streams: names.
            weights: what the unit was loaded with.
        """
        names = list(streams)
        first = [name for name in names if not self._lists or name.endswith(_OF_THE_ORIGINAL)]
        yield first, False
        rest = [name for name in names if name not in first]
        if not rest:
            return
        stored = {self._skeleton.parameter_of.get(name, name): (name, tensor.dtype) for name, tensor in weights.items()}
        with ExitStack() as stack:
            for blocks in self._lists:
                for index in range(blocks.count):
                    stack.callback(blocks.put(index, stored).remove_hooks)
            yield rest, True
