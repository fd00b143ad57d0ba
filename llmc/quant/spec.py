"""How one tensor is quantized, as a value: hashable, comparable, serializable."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

SymMode = Literal["restricted", "full", "gptq"]


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


Granularity = PerTensor | PerChannel | PerGroup


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
    """An integer grid and the tensors that share a scale.

    Attributes:
        bits: 2 to 8.
        symmetric: no zero point.
        granularity: which weights share a scale.
        sym_mode: how a symmetric scale follows from the largest magnitude ``m`` (algorithms differ by convention):
            ``restricted`` is ``m / (2^(b-1) - 1)`` (LLMC, AWQ); ``gptq`` is ``2m / (2^b - 1)`` (GPTQ,
            compressed-tensors); ``full`` gives the tail with the larger magnitude the code ``-2^(b-1)``, so that a
            scale may be negative (AutoRound, ggml's Q4_0).
        ranges: how the range is found.
        scale_dtype: the dtype in which the scale is stored. Scales are rounded to it *before* codes are computed, so
            that what is evaluated is what is exported.
    """

    bits: int
    symmetric: bool
    granularity: Granularity
    sym_mode: SymMode = "restricted"
    ranges: RangeSpec = field(default_factory=MinMax)
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"integer weights have 2 to 8 bits, not {self.bits}")

    @property
    def qmin(self) -> int:
        """Smallest code. Codes are signed, also on asymmetric grids (an unsigned grid shifted by ``2^(b-1)``)."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    def group_size(self, columns: int) -> int:
        """Columns that share a scale in a row of ``columns`` inputs."""
        return self.granularity.size if isinstance(self.granularity, PerGroup) else columns

    def describe(self) -> str:
        """A short name such as ``W4 g64 asym``."""
        kind = {PerTensor: "tensor", PerChannel: "channel"}.get(type(self.granularity))
        group = kind or f"g{self.group_size(0)}"
        return f"W{self.bits} {group} {'sym' if self.symmetric else 'asym'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the journal and ``metrics.json``."""
        plain = asdict(self)
        plain["granularity"] = {"kind": type(self.granularity).__name__, **plain["granularity"]}
        plain["ranges"] = {"kind": type(self.ranges).__name__, **plain["ranges"]}
        plain["scale_dtype"] = str(self.scale_dtype).removeprefix("torch.")
        return plain
