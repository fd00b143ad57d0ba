"""ggml's blocks, byte for byte: which type holds a grid exactly, and the bytes that codes become.

Layouts are those of ggml's ``block_*`` structs and of ``gguf.quants``, which dequantizes them. A block's values share a
scale. Types of whose blocks parts have scales of their own (Q2_K to Q6_K) get the factor 1 for every part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ExportError
from ..quant import PerChannel, PerGroup, PerTensor, QuantSpec, QWeight

ZERO = "zero_point"
"""The last part of the names of zero points, which shards have for the way back; the file doesn't need them."""

_HALF_DIGITS = 11  # significant bits of a float16


@dataclass(frozen=True)
class Blocks:
    """Blocks to be written.

    Attributes:
        values: uint8 ``[blocks, size]``, what a type stores of each weight.
        scale: float16 ``[blocks]``.
        minimum: uint8 ``[blocks]``, the stored value that means 0; of types without one unused.
    """

    values: Tensor
    scale: Tensor
    minimum: Tensor


class Part(Protocol):
    """A run of a block's bytes."""

    def nbytes(self, size: int) -> int:
        """How many, in a block of ``size`` weights."""
        ...

    def write(self, blocks: Blocks) -> Tensor:
        """uint8 ``[blocks, nbytes]``."""
        ...


@dataclass(frozen=True)
class Scale:
    """The scale; in types with minima also their scale."""

    def nbytes(self, size: int) -> int:
        """A float16."""
        return 2

    def write(self, blocks: Blocks) -> Tensor:
        """Little endian."""
        return _half(blocks.scale)


@dataclass(frozen=True)
class Product:
    """What is added to each product: minus scale times minimum."""

    def nbytes(self, size: int) -> int:
        """A float16."""
        return 2

    def write(self, blocks: Blocks) -> Tensor:
        """Little endian.

        Raises:
            ExportError: it isn't a float16.
        """
        exact = -blocks.scale.float() * blocks.minimum.float()
        if not torch.equal(exact.half().float(), exact):
            raise ExportError("a minimum of Q4_1 isn't a float16", "please report this")
        return _half(exact.half())


@dataclass(frozen=True)
class Bits:
    """Some bits of every value: a byte holds those of ``8 / count`` values that are ``stride`` values apart."""

    count: int
    stride: int
    shift: int = 0

    def nbytes(self, size: int) -> int:
        """All values' bits."""
        return size * self.count // 8

    def write(self, blocks: Blocks) -> Tensor:
        """The first of a byte's values in its lowest bits."""
        bits = (blocks.values >> self.shift) & ((1 << self.count) - 1)
        spread = bits.reshape(len(bits), -1, 8 // self.count, self.stride)
        return _sum_of(spread << self._places()).reshape(len(bits), -1)

    def read(self, stored: Tensor) -> Tensor:
        """The inverse: from ``[blocks, nbytes]`` to these bits in their places of ``[blocks, size]``."""
        spread = stored.reshape(len(stored), -1, 1, self.stride) >> self._places()
        return ((spread & ((1 << self.count) - 1)) << self.shift).reshape(len(stored), -1)

    def _places(self) -> Tensor:
        return torch.arange(0, 8, self.count, dtype=torch.uint8)[:, None]


@dataclass(frozen=True)
class Fixed:
    """The same bytes in every block: the parts' factors, all 1."""

    content: bytes

    def nbytes(self, size: int) -> int:
        """As given."""
        return len(self.content)

    def write(self, blocks: Blocks) -> Tensor:
        """As given."""
        return torch.tensor(list(self.content), dtype=torch.uint8).expand(len(blocks.values), -1)


@dataclass(frozen=True)
class PairsOf16:
    """Q2_K: factor and minimum of each of 16 parts, 4 bits each."""

    def nbytes(self, size: int) -> int:
        """A byte for each part."""
        return 16

    def write(self, blocks: Blocks) -> Tensor:
        """The factor in the lower half."""
        return (1 | blocks.minimum << 4)[:, None].expand(-1, 16)


@dataclass(frozen=True)
class PairsOf8:
    """Q4_K, Q5_K: factors and minima of 8 parts, 6 bits each.

    Bytes 0-3 hold the factors of the first four parts, 4-7 their minima; 8-11 the lower 4 bits of the others' factors
    and minima, whose upper 2 bits are on top of bytes 0-3 and 4-7.
    """

    def nbytes(self, size: int) -> int:
        """12 bytes."""
        return 12

    def write(self, blocks: Blocks) -> Tensor:
        """The same minimum for all parts."""
        minimum = blocks.minimum
        ones, upper, lower = torch.ones_like(minimum), minimum & 63 | minimum >> 4 << 6, 1 | (minimum & 15) << 4
        return torch.stack([ones, upper, lower], 1).repeat_interleave(4, 1)


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types.

    Attributes:
        name: ggml's.
        size: weights in a block.
        bits: of a stored value.
        parts: a block's bytes in their order.
        signed: whether values are ``code - zero`` (plus an offset); else ``code - qmin``, beside a minimum.
        offset: what is added to signed values.
        rounds_minimum: whether the minimum is stored as a float16 product.
    """

    name: str
    size: int
    bits: int
    parts: tuple[Part, ...]
    signed: bool = True
    offset: int = 0
    rounds_minimum: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return sum(part.nbytes(self.size) for part in self.parts)

    def holds(self, spec: QuantSpec, columns: int) -> bool:
        """Whether every weight ``[_, columns]`` on the grid is stored without an error."""
        run = _run(spec, columns)
        if run is None or spec.grid != "int" or spec.scale_dtype != torch.float16 or run % self.size:
            return False
        if self.signed:
            reach = spec.bits - 1 if spec.symmetric else spec.bits  # |code - zero| <= 2^reach
            return reach <= self.bits - 1
        digits = _HALF_DIGITS if spec.scale_digits is None else spec.scale_digits
        exact = digits + spec.bits <= _HALF_DIGITS or not self.rounds_minimum
        return spec.bits <= self.bits and exact

    def pack(self, weight: QWeight) -> Tensor:
        """The blocks of a weight ``[out, in]`` row by row, uint8 ``[out, in / size * nbytes]``.

        Raises:
            ExportError: a value lies outside of the type's range.
        """
        rows, columns = weight.codes.shape
        count = columns // self.size
        scale = _for_blocks(weight.scale, rows, count).reshape(-1)
        zero = torch.zeros_like(weight.scale, dtype=torch.int16) if weight.zero is None else weight.zero.to(torch.int16)
        zero = _for_blocks(zero, rows, count).reshape(-1)
        codes = weight.codes.to(torch.int16).reshape(-1, self.size)
        if self.signed:
            values, minimum, low = codes - zero[:, None], torch.zeros_like(zero), -(1 << (self.bits - 1))
        else:
            values, minimum, low = codes - weight.spec.qmin, zero - weight.spec.qmin, 0
        least, most = (int(extreme) for extreme in torch.aminmax(values))
        if least < low or most >= low + (1 << self.bits) or int(minimum.min()) < 0:
            raise ExportError(f"values {least}...{most} don't fit into {self.name}", "please report this")
        # A negative int8, which only Q8_0 stores, is its two's complement.
        stored = ((values + self.offset) & 255).to(torch.uint8)
        blocks = Blocks(stored, scale, minimum.to(torch.uint8))
        return torch.cat([part.write(blocks) for part in self.parts], 1).reshape(rows, -1)

    def unpack(self, packed: Tensor, zero: Tensor | None, spec: QuantSpec) -> QWeight:
        """The inverse, with zero points that were kept beside the blocks (many types store only ``code - zero``)."""
        blocks = packed.reshape(-1, self.nbytes)
        rows, columns = len(packed), packed.shape[1] // self.nbytes * self.size
        values = torch.zeros(len(blocks), self.size, dtype=torch.uint8)
        scale, start = None, 0
        for part in self.parts:
            stored = blocks[:, start : start + part.nbytes(self.size)]
            start += stored.shape[1]
            if isinstance(part, Bits):
                values |= part.read(stored)
            elif isinstance(part, Scale) and scale is None:
                scale = stored.contiguous().view(torch.float16).reshape(rows, -1)
        if scale is None:
            raise ExportError(f"{self.name} has no scale", "please report this")
        groups = spec.scale_shape(rows, columns)
        kept = scale[: groups[0], :: scale.shape[1] // groups[1]].contiguous()
        if self.signed:
            codes = (values.to(torch.int16) - self.offset).to(torch.int8).reshape(rows, columns)
            offset = torch.zeros_like(kept, dtype=torch.int8) if zero is None else zero
            codes = codes + _for_blocks(offset, rows, columns // self.size).repeat_interleave(self.size, 1)
        else:
            codes = (values.to(torch.int16) + spec.qmin).to(torch.int8).reshape(rows, columns)
        return QWeight(codes, kept, zero, spec)


_K, _FACTORS_Q3 = 256, b"\x11" * 8 + b"\xaa" * 4  # 33 in 6 bits sixteen times, which means 33 - 32
TYPES: tuple[BlockType, ...] = (
    BlockType("Q4_0", 32, 4, (Scale(), Bits(4, 16)), offset=8),
    BlockType("Q4_1", 32, 4, (Scale(), Product(), Bits(4, 16)), signed=False, rounds_minimum=True),
    BlockType("Q5_0", 32, 5, (Scale(), Bits(1, 1, shift=4), Bits(4, 16)), offset=16),
    BlockType("Q8_0", 32, 8, (Scale(), Bits(8, 32))),
    BlockType("Q2_K", _K, 2, (PairsOf16(), Bits(2, 32), Scale(), Scale()), signed=False),
    BlockType("Q3_K", _K, 3, (Bits(1, 32, shift=2), Bits(2, 32), Fixed(_FACTORS_Q3), Scale()), offset=4),
    BlockType("Q4_K", _K, 4, (Scale(), Scale(), PairsOf8(), Bits(4, 32)), signed=False),
    BlockType("Q5_K", _K, 5, (Scale(), Scale(), PairsOf8(), Bits(1, 32, shift=4), Bits(4, 32)), signed=False),
    BlockType("Q6_K", _K, 6, (Bits(4, 64), Bits(2, 32, shift=4), Fixed(b"\x01" * 16), Scale()), offset=32),
)
BY_NAME = {kind.name: kind for kind in TYPES}


def find_type(spec: QuantSpec, columns: int) -> BlockType | None:
    """The smallest type that holds a grid exactly in rows of ``columns`` weights; None if there is none."""
    able = [kind for kind in TYPES if kind.holds(spec, columns)]
    return min(able, key=lambda kind: kind.nbytes / kind.size, default=None)


def _run(spec: QuantSpec, columns: int) -> int | None:
    """Neighbours in a row that share a scale; None if they aren't neighbours, or rows share it too."""
    if isinstance(spec.granularity, PerGroup):
        return spec.granularity.size
    return columns if isinstance(spec.granularity, PerChannel | PerTensor) else None


def _for_blocks(qparam: Tensor, rows: int, count: int) -> Tensor:
    """From one for each group ``[out or 1, groups]`` to one for each block ``[out, count]``."""
    return qparam.repeat_interleave(count // qparam.shape[1], 1).expand(rows, count)


def _half(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8).reshape(-1, 2)


def _sum_of(spread: Tensor) -> Tensor:
    """Bytes whose bits don't overlap, put together along the third dimension."""
    return spread.sum(2, dtype=torch.uint8)
