"""How one tensor is quantized, as a value: hashable, comparable, serializable."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

SymMode = Literal["restricted", "full", "gptq"]
Grid = Literal["int", "e4m3", "e5m2", "e2m1"]

FLOAT_BITS: dict[str, int] = {"e4m3": 8, "e5m2": 8, "e2m1": 4}
"""Bits of the float grids."""


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel (row of an ``[out, in]`` weight)."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of ``size`` consecutive input channels of a row."""

    size: int


@dataclass(frozen=True)
class PerBlock:
    """One scale for each block of ``size`` rows by ``size`` columns; those at the edges may be smaller."""

    size: int


@dataclass(frozen=True)
class PerToken:
    """One scale for each row of activations ``[tokens, in]``."""


@dataclass(frozen=True)
class PerCluster:
    """One scale for each cluster of channels with similar ranges (of a weight: for each row and cluster of its inputs).

    ``count`` is the number of clusters of one Linear's input; None where no Linear is meant yet.
    """

    count: int | None = None


Granularity = PerTensor | PerChannel | PerGroup | PerBlock | PerToken | PerCluster


@dataclass(frozen=True)
class MinMax:
    """The range is the smallest and largest value."""


@dataclass(frozen=True)
class Mse:
    """The range is shrunk to the one with the least error ``sum |Q(w) - w|^norm`` (the GPTQ code's search).

    Candidates are ``1 - i/grid`` times the min-max range, ``i = 0 ... max_shrink*grid - 1``.
    """

    max_shrink: float = 0.8
    grid: int = 100
    norm: float = 2.4


RangeSpec = MinMax | Mse


@dataclass(frozen=True)
class QuantSpec:
    """A grid and the values that share a scale.

    Attributes:
        bits: 2 to 8 on integer grids; on float grids what the format has.
        symmetric: no zero point. Float grids have none.
        granularity: which values share a scale.
        sym_mode: how a symmetric integer scale follows from the largest magnitude ``m`` (algorithms differ by
            convention): ``restricted`` is ``m / (2^(b-1) - 1)`` (LLMC, AWQ); ``gptq`` is ``2m / (2^b - 1)`` (GPTQ,
            compressed-tensors); ``full`` gives the tail with the larger magnitude the code ``-2^(b-1)``, so that a
            scale may be negative (AutoRound, ggml's Q4_0).
        ranges: how the range is found.
        scale_dtype: the dtype in which the scale is stored. Scales are rounded to it *before* codes are computed, so
            that what is evaluated is what is exported. ``float8_e8m0fnu`` makes a float grid an MX format,
            ``float8_e4m3fn`` makes e2m1 NVFP4.
        grid: ``int``, or a float format: FP8 ``e4m3`` (largest value 448) and ``e5m2`` (57344), FP4 ``e2m1`` (6).
        global_scale: NVFP4 only: what all scales of a tensor are multiplied by to fill the range of their dtype. None
            until ``bind_global_scale`` has seen the tensor.
        shared_range: float grids with one scale per tensor only: the largest magnitude of all tensors that a backend
            runs as one, from ``bind_global_scale``. It sets aside whatever range is found for one of them, since such
            tensors have one scale. None: a tensor's own range counts.
        exact_product: the backend multiplies codes and scales in float32, whatever the scale's dtype (llama.cpp).
        scale_digits: significant binary digits that are kept of each scale; None: all that its dtype has.

    Raises:
        ValueError: a combination that no format has.
    """

    bits: int
    symmetric: bool
    granularity: Granularity
    sym_mode: SymMode = "restricted"
    ranges: RangeSpec = field(default_factory=MinMax)
    scale_dtype: torch.dtype = torch.float32
    grid: Grid = "int"
    global_scale: float | None = None
    shared_range: float | None = None
    exact_product: bool = False
    scale_digits: int | None = None

    def __post_init__(self) -> None:
        if self.grid == "int" and not 2 <= self.bits <= 8:
            raise ValueError(f"integer weights have 2 to 8 bits, not {self.bits}")
        if self.grid == "int" and (self.is_mx or self.is_nvfp4):
            raise ValueError("scales of 8 bits belong to float grids")
        if self.grid != "int" and (self.bits != FLOAT_BITS[self.grid] or not self.symmetric):
            raise ValueError(f"{self.grid} has {FLOAT_BITS[self.grid]} bits and no zero point")
        if self.scale_digits is not None and (self.scale_digits < 1 or self.grid != "int"):
            raise ValueError("a scale of an integer grid keeps at least one digit; those of float grids keep all")
        if self.is_nvfp4 and self.grid != "e2m1":
            raise ValueError("scales in e4m3 belong to e2m1 (NVFP4)")

    @classmethod
    def floating(
        cls,
        grid: Grid,
        granularity: Granularity,
        scale_dtype: torch.dtype = torch.float32,
        ranges: RangeSpec | None = None,
    ) -> QuantSpec:
        """A float grid."""
        return cls(FLOAT_BITS[grid], True, granularity, ranges=ranges or MinMax(), scale_dtype=scale_dtype, grid=grid)

    @property
    def is_mx(self) -> bool:
        """Whether scales are powers of two (OCP microscaling formats)."""
        return self.scale_dtype == torch.float8_e8m0fnu

    @property
    def is_nvfp4(self) -> bool:
        """Whether scales are e4m3 numbers over one global scale."""
        return self.scale_dtype == torch.float8_e4m3fn

    @property
    def qmin(self) -> int:
        """Smallest integer code. Codes are signed, also on asymmetric grids (an unsigned grid less ``2^(b-1)``)."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest integer code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        """What codes are kept in. The values of e2m1 are values of e4m3, too."""
        if self.grid == "int":
            return torch.int8
        return torch.float8_e5m2 if self.grid == "e5m2" else torch.float8_e4m3fn

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype in which ``code * scale`` is kept: the scale's, or float32 where it has 8 bits or must be exact."""
        return torch.float32 if self.is_mx or self.is_nvfp4 or self.exact_product else self.scale_dtype

    @property
    def zero_dtype(self) -> torch.dtype:
        """What zero points are kept in. Those of clusters may lie far outside of the codes."""
        return torch.int16 if isinstance(self.granularity, PerCluster) else torch.int8

    @property
    def zero_bits(self) -> int:
        """Bits of a zero point; 0 where there is none."""
        if self.symmetric:
            return 0
        return 16 if isinstance(self.granularity, PerCluster) else self.bits

    def stored_bits(self, weights: int, scales: int) -> int:
        """Bits of so many codes with their scales and zero points."""
        return weights * self.bits + scales * (8 * self.scale_dtype.itemsize + self.zero_bits)

    def group_size(self, columns: int) -> int:
        """Columns that share a scale in a row of ``columns`` inputs."""
        return self.granularity.size if isinstance(self.granularity, PerGroup | PerBlock) else columns

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales of ``[rows, columns]``."""
        if isinstance(self.granularity, PerTensor):
            return 1, 1
        if isinstance(self.granularity, PerCluster):
            if self.granularity.count is None:
                raise ValueError("the number of clusters isn't known yet")
            return rows, min(self.granularity.count, columns)
        size = self.group_size(columns)
        return (-(-rows // size) if isinstance(self.granularity, PerBlock) else rows), -(-columns // size)

    def describe(self, letter: str = "W") -> str:
        """A short name such as ``W4 g64 asym``, ``W8 e4m3 channel`` or ``W4 nvfp4``."""
        name = f"{letter}{self.bits}"
        if self.is_mx or self.is_nvfp4:
            return f"{name} nvfp4" if self.is_nvfp4 else f"{name} mxfp{self.bits}"
        shared = {PerTensor: "tensor", PerChannel: "channel", PerToken: "token", PerCluster: "cluster"}.get(
            type(self.granularity)
        )
        if isinstance(self.granularity, PerBlock):
            shared = f"block{self.granularity.size}"
        group = shared or f"g{self.group_size(0)}"
        if self.grid != "int":
            return f"{name} {self.grid} {group}"
        return f"{name} {group} {'sym' if self.symmetric else 'asym'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the journal and ``metrics.json``."""
        plain = asdict(self)
        plain["granularity"] = {"kind": type(self.granularity).__name__, **plain["granularity"]}
        plain["ranges"] = {"kind": type(self.ranges).__name__, **plain["ranges"]}
        plain["scale_dtype"] = str(self.scale_dtype).removeprefix("torch.")
        return plain
