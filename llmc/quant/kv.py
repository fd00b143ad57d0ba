"""The KV cache on a grid: what attention sees of keys and values that a cache keeps quantized.

A cache is *append-only*: a token is quantized once, from its full-precision values, and never again. So what a
position looks like once it's quantized (``CacheScheme.keys``, ``.values``) doesn't depend on when somebody looks, and a
scheme is that plus two numbers for each token: how many of the oldest keys and values it sees quantized. ``KvCache``
acts this out token by token; a whole window at once needs only the numbers (see ``llmc/stream/attention.py``).

States are ``[batch, heads, tokens, dim]``; keys are those behind the rotary embedding, as caches hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from . import affine
from .floats import widened
from .spec import PerGroup, PerTensor, PerToken, QuantSpec


@dataclass(frozen=True)
class IntGrid:
    """Integers.

    Attributes:
        bits: 2 to 8.
        symmetric: no zero point.
        offset: of an asymmetric grid. False: the zero point is an integer and the range is made to include 0. True: the
            range's minimum is stored beside the scale, and the range needn't include 0, so that a channel whose values
            all lie far from 0 keeps its resolution (KIVI).
        scale_dtype: in which scales and minima are stored; they are rounded to it before codes are computed.
    """

    bits: int
    symmetric: bool
    offset: bool = False
    scale_dtype: torch.dtype = torch.float16

    @property
    def spec(self) -> QuantSpec:
        """The same as the grid of a weight, for its arithmetic."""
        return QuantSpec(self.bits, self.symmetric, PerTensor(), scale_dtype=self.scale_dtype)

    @property
    def bits_a_scale(self) -> int:
        """Bits stored for each group beside its codes."""
        scale = 8 * self.scale_dtype.itemsize
        return scale + (0 if self.symmetric else scale if self.offset else self.bits)

    def qparams(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point (with ``offset``: scale and minimum) of ranges of any shape, float32."""
        if self.symmetric or not self.offset:
            return affine.qparams(lo, hi, self.spec)
        scale = affine.store((hi.float() - lo.float()) / (2**self.bits - 1), self.scale_dtype)
        largest = torch.finfo(self.scale_dtype).max
        return scale, lo.float().clamp(-largest, largest).to(self.scale_dtype).float()

    def round(self, values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The nearest values of the grid, float32."""
        if self.symmetric or not self.offset:
            return affine.fake_quantize(values, scale, shift, self.spec)
        return ((values.float() - shift) / scale).round_().clamp_(0, 2**self.bits - 1).mul_(scale).add_(shift)


@dataclass(frozen=True)
class Fp8Grid:
    """8-bit floats, ``float8_e4m3fn`` or ``float8_e5m2``, that saturate instead of overflowing."""

    dtype: torch.dtype
    scale_dtype: torch.dtype = torch.float32

    @property
    def bits_a_scale(self) -> int:
        """Bits stored for each group beside its codes."""
        return 8 * self.scale_dtype.itemsize

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8

    def qparams(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """The scale that puts the largest magnitude on the format's largest value, and zeros; float32."""
        scale = affine.store(torch.maximum(-lo.float(), hi.float()) / torch.finfo(self.dtype).max, self.scale_dtype)
        return scale, torch.zeros_like(scale)

    def round(self, values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The nearest values of the grid, float32."""
        largest = torch.finfo(self.dtype).max
        codes = (values.float() / scale).clamp_(-largest, largest).to(self.dtype)
        return widened(codes).mul_(scale)


KvGrid = IntGrid | Fp8Grid


def on_grid(groups: Tensor, grid: KvGrid) -> Tensor:
    """Round groups ``[..., group]``, each on the grid of its own smallest and largest value; the dtype is kept."""
    lo, hi = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # aminmax takes many times as long on a CPU
    return grid.round(groups, *grid.qparams(lo, hi)).to(groups.dtype)


def by_token(states: Tensor, grid: KvGrid, group: int | None) -> Tensor:
    """Round each token of each head, in groups of ``group`` channels (None: all of the head's).

    Raises:
        RuntimeError: ``group`` doesn't divide the channels.
    """
    *outer, dim = states.shape
    return on_grid(states.reshape(*outer, -1, group or dim), grid).reshape(states.shape)


def by_whole_token(states: Tensor, grid: KvGrid) -> Tensor:
    """Round each token with one scale for all heads."""
    tokens = states.transpose(1, 2)
    return on_grid(tokens.flatten(2), grid).reshape(tokens.shape).transpose(1, 2)


def by_channel(states: Tensor, grid: KvGrid, group: int) -> Tensor:
    """Round each channel in groups of ``group`` consecutive tokens; tokens behind the last whole group stay."""
    batch, heads, tokens, dim = states.shape
    whole = tokens // group * group
    groups = states[:, :, :whole].reshape(batch, heads, -1, group, dim).transpose(-1, -2)
    return torch.cat([on_grid(groups, grid).transpose(-1, -2).flatten(2, 3), states[:, :, whole:]], dim=2)


@dataclass(frozen=True)
class KvRanges:
    """Smallest and largest key and value of one layer on the calibration text."""

    key: tuple[float, float]
    value: tuple[float, float]


@dataclass(frozen=True)
class KvSpec:
    """How a KV cache is quantized: hashable, comparable, serializable.

    Attributes:
        method: ``Naive``: every token when it's appended, so that it sees even itself quantized. ``Kivi``: keys by
            channel in groups of tokens, values by token, the latest in full precision (KIVI, Liu et al. 2024, algorithm
            1 in the order of its published code, where a token's attention runs before its residual is quantized).
        grid: the codes.
        granularity: who shares a scale. Naive: a token of all heads (``PerTensor``; with ``static`` the whole cache of
            the layer), of one head, or a group of its channels. Kivi: ``PerGroup(g)`` is g tokens of a key channel, and
            g channels of a value; ``PerToken`` is the residual's tokens, and all channels of a head.
        residual: of Kivi, R: keys are quantized R at a time when so many have come together, values when R are younger.
        static: ranges come from calibration text.
    """

    method: Literal["Naive", "Kivi"]
    grid: KvGrid
    granularity: PerTensor | PerToken | PerGroup
    residual: int = 0
    static: bool = False

    @property
    def group(self) -> int | None:
        """Size of a group, if there are groups."""
        return self.granularity.size if isinstance(self.granularity, PerGroup) else None

    def scheme(self, ranges: KvRanges | None) -> CacheScheme:
        """What the cache of one layer does; ``ranges`` are its own, and needed for a static one only.

        Raises:
            ValueError: a static cache without ranges.
        """
        if self.static:
            if ranges is None:
                raise ValueError("a static KV cache needs calibrated ranges")
            return StaticScheme(self.grid, ranges)
        if self.method == "Kivi":
            return KiviScheme(self.grid, self.residual, self.group)
        return NaiveScheme(self.grid, self.granularity)

    def bits_an_element(self, heads: int, dim: int) -> float:
        """Bits of a quantized key or value with its share of the scales (the mean of both, in a long cache)."""
        value = self.group or (heads * dim if isinstance(self.granularity, PerTensor) else dim)
        key = (self.group or self.residual) if self.method == "Kivi" else value
        scales = 0.0 if self.static else self.grid.bits_a_scale * (1 / key + 1 / value) / 2
        return self.grid.bits + scales

    def describe(self) -> str:
        """A short name such as ``Kivi 2 bits asym g32``."""
        grid = self.grid
        number = f"{grid.bits} bits {'sym' if grid.symmetric else 'asym'}" if isinstance(grid, IntGrid) else "fp8"
        share = f"g{self.group}" if self.group else "tensor" if isinstance(self.granularity, PerTensor) else "token"
        return f"{self.method} {number} {share}{' static' if self.static else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``metrics.json``."""
        grid = {"kind": type(self.grid).__name__, **vars(self.grid)}
        grid |= {key: str(v).removeprefix("torch.") for key, v in grid.items() if isinstance(v, torch.dtype)}
        share = {"kind": type(self.granularity).__name__, **asdict(self.granularity)}
        return {**vars(self), "grid": grid, "granularity": share}


class CacheScheme(Protocol):
    """What the cache of one layer does with keys and values."""

    def keys(self, states: Tensor) -> Tensor:
        """The quantized form of ``[batch, heads, tokens, dim]``, in the same dtype. The states begin with the window or
        where a part ends that is quantized together; what can't be quantized yet is returned as it is."""
        ...

    def values(self, states: Tensor) -> Tensor:
        """The same of values."""
        ...

    def quantized_keys(self, position: Tensor) -> Tensor:
        """How many of the oldest keys the tokens at ``position`` (int64, any shape) see quantized; never falls, and
        isn't below the number of values."""
        ...

    def quantized_values(self, position: Tensor) -> Tensor:
        """The same of values."""
        ...


@dataclass(frozen=True)
class _AtOnce:
    """Every token is quantized when it's appended."""

    grid: KvGrid

    def quantized_keys(self, position: Tensor) -> Tensor:
        return position + 1

    def quantized_values(self, position: Tensor) -> Tensor:
        return position + 1


@dataclass(frozen=True)
class NaiveScheme(_AtOnce):
    """Each token has scales of its own."""

    granularity: PerTensor | PerToken | PerGroup

    def keys(self, states: Tensor) -> Tensor:
        """``[batch, heads, tokens, dim]`` rounded."""
        if isinstance(self.granularity, PerTensor):
            return by_whole_token(states, self.grid)
        return by_token(states, self.grid, self.granularity.size if isinstance(self.granularity, PerGroup) else None)

    def values(self, states: Tensor) -> Tensor:
        """The same."""
        return self.keys(states)


@dataclass(frozen=True)
class StaticScheme(_AtOnce):
    """One scale for all keys and one for all values of the layer."""

    ranges: KvRanges

    def keys(self, states: Tensor) -> Tensor:
        """``[batch, heads, tokens, dim]`` rounded."""
        return self._round(states, self.ranges.key)

    def values(self, states: Tensor) -> Tensor:
        """The same."""
        return self._round(states, self.ranges.value)

    def _round(self, states: Tensor, limits: tuple[float, float]) -> Tensor:
        scale, shift = cache_qparams(self.grid, limits)
        return self.grid.round(states, scale.to(states.device), shift.to(states.device)).to(states.dtype)


def cache_qparams(grid: KvGrid, limits: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Scale and zero point (or minimum) of a calibrated range, float32 scalars."""
    lo, hi = torch.tensor(limits, dtype=torch.float32)
    return grid.qparams(lo, hi)


def cache_scales(kv: KvSpec, ranges: KvRanges) -> dict[str, Tensor]:
    """Scales of a static KV cache as checkpoints store them beside a layer's attention: ``k_scale``, ``v_scale``,
    float32 ``[1]``."""
    limits = {"k_scale": ranges.key, "v_scale": ranges.value}
    return {name: cache_qparams(kv.grid, ends)[0].reshape(1) for name, ends in limits.items()}


@dataclass(frozen=True)
class KiviScheme:
    """Keys by channel, ``residual`` tokens at a time; values by token when ``residual`` are younger."""

    grid: KvGrid
    residual: int
    group: int | None

    def keys(self, states: Tensor) -> Tensor:
        """``[batch, heads, tokens, dim]`` rounded by channel, as far as groups of tokens are whole."""
        return by_channel(states, self.grid, self.group or self.residual)

    def values(self, states: Tensor) -> Tensor:
        """Rounded by token."""
        return by_token(states, self.grid, self.group)

    def quantized_keys(self, position: Tensor) -> Tensor:
        """Whole residuals before the token."""
        return position // self.residual * self.residual

    def quantized_values(self, position: Tensor) -> Tensor:
        """All but the ``residual`` before the token."""
        return (position - self.residual).clamp(min=0)


class KvCache:
    """An append-only cache of one layer, acted out: each position is written in full precision and overwritten once.

    Args:
        scheme: what is quantized when; None keeps everything as it is.
        capacity: tokens that will be appended.
    """

    def __init__(self, scheme: CacheScheme | None, capacity: int) -> None:
        self._scheme = scheme
        self._keys = self._values = torch.empty(0)
        self._count = self._done_keys = self._done_values = 0
        positions = torch.arange(capacity)
        self._due_keys: list[int] = [0] * capacity if scheme is None else scheme.quantized_keys(positions).tolist()
        self._due_values: list[int] = [0] * capacity if scheme is None else scheme.quantized_values(positions).tolist()

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add a token ``[batch, heads, 1, dim]``.

        Returns:
            The keys and values ``[batch, heads, tokens so far, dim]`` that it sees. Valid until the next call.
        """
        if self._count == 0:
            self._keys, self._values = (self._room(state) for state in (key, value))
        self._keys[:, :, self._count], self._values[:, :, self._count] = key[:, :, 0], value[:, :, 0]
        if self._scheme is not None:
            self._done_keys = _settle(self._keys, self._done_keys, self._due_keys[self._count], self._scheme.keys)
            self._done_values = _settle(
                self._values, self._done_values, self._due_values[self._count], self._scheme.values
            )
        self._count += 1
        return self._keys[:, :, : self._count], self._values[:, :, : self._count]

    def _room(self, state: Tensor) -> Tensor:
        return state.new_empty(state.shape[0], state.shape[1], len(self._due_keys), state.shape[3])


def _settle(states: Tensor, done: int, due: int, rounded: Callable[[Tensor], Tensor]) -> int:
    """Overwrite positions ``done`` to ``due`` by their quantized form."""
    if due > done:
        states[:, :, done:due] = rounded(states[:, :, done:due])
    return due
