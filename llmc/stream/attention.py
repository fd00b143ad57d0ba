"""Attention over a quantized KV cache, as an attention function registered with Transformers.

A model calls it with queries, keys (behind the rotary embedding) and values of a whole window, whatever its own code
does before and after. ``CachedAttention`` computes what a decoder that appends the window token by token to a quantized
cache would, in one of two ways that must agree: by masks over the whole window, or by acting it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..errors import ModelError
from ..linalg import OnlineRotation
from ..quant import CacheScheme, KvCache, KvRanges, KvSpec
from .stages import BlockRun

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
_functions: Any = AttentionInterface  # without annotations
_masks: Any = AttentionMaskInterface

_NAME = "llmc_kv_cache"
_QUERIES = 512  # of a window that are attended at once: the mask has so many rows


@contextmanager
def attending(model: Any, function: AttentionFunction) -> Iterator[None]:
    """Within the context the model's attention modules call ``function``.

    Args:
        model: a transformers model.
        function: called as ``function(module, query, key, value, mask, **options)`` with queries
            ``[batch, heads, tokens, dim]``, keys and values ``[batch, kv heads, tokens, dim]`` and the mask that
            Transformers made for SDPA (None: causal); returns ``[batch, tokens, heads, dim]`` and None.

    Raises:
        ModelError: the model's code has an attention of its own, which can't be replaced.
    """
    before = model.config.get_text_config()._attn_implementation
    inner = _functions().get(_NAME)
    if before not in ("sdpa", _NAME):
        raise ModelError(
            f"the attention of this model is '{before}', not Transformers' exchangeable SDPA",
            "its KV cache can't be quantized here: remove quant.kvcache and eval type decode_ppl",
        )
    _functions.register(_NAME, function)
    _masks.register(_NAME, _masks()["sdpa"])
    model.set_attn_implementation(_NAME)
    try:
        if model.config.get_text_config()._attn_implementation != _NAME:
            raise ModelError(
                "the attention of this model doesn't go through Transformers' attention interface",
                "its KV cache can't be quantized here: remove quant.kvcache and eval type decode_ppl",
            )
        yield
    finally:
        if inner is not None:
            _functions.register(_NAME, inner)
        model.set_attn_implementation(before)


def check_attention(model: Any) -> None:
    """Refuse a model whose attention can't be replaced.

    Raises:
        ModelError: says why.
    """
    with attending(model, _sdpa()):
        pass


def _sdpa() -> AttentionFunction:
    function: AttentionFunction = _functions()["sdpa"]
    return function


class CachedAttention:
    """Attention of a window whose tokens are appended one by one to a cache.

    Args:
        scheme: what the cache does; None keeps everything in full precision.
        decode: act it out token by token, with a cache, instead of working it out for the whole window.
        rotation: of each head of queries and keys, so that the cache holds rotated keys (QuaRot's R3).
    """

    def __init__(self, scheme: CacheScheme | None, *, decode: bool, rotation: OnlineRotation | None = None) -> None:
        self._scheme, self._decode, self._rotation, self._sdpa = scheme, decode, rotation, _sdpa()

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """See ``attending``."""
        if self._rotation is not None:
            query, key = self._rotation(query), self._rotation(key)
        parts = self._decoded if self._decode else self._windowed
        return torch.cat(list(parts(module, query, key, value, mask, options)), dim=1), None

    def _decoded(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Iterator[Tensor]:
        """One token after the other."""
        cache = KvCache(self._scheme, key.shape[2])
        for at in range(key.shape[2]):
            one = slice(at, at + 1)
            seen = cache.append(key[:, :, one], value[:, :, one])
            row = None if mask is None else mask[:, :, one, : at + 1]
            yield self._sdpa(module, query[:, :, one], *seen, row, **options)[0]

    def _windowed(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Iterator[Tensor]:
        """Some queries at a time, each choosing by its mask in which form it sees a position.

        Every position is there three times: quantized, with a quantized key only, and in full precision (a value is
        never quantized before its key).
        """
        if self._scheme is None:
            yield self._sdpa(module, query, key, value, mask, **options)[0]
            return
        keys, values = self._scheme.keys(key), self._scheme.values(value)
        positions = torch.arange(key.shape[2], device=key.device)
        if (self._scheme.quantized_values(positions) > positions).all():  # also by the tokens themselves
            yield self._sdpa(module, query, keys, values, mask, **options)[0]
            return
        for start in range(0, key.shape[2], _QUERIES):
            stop = min(start + _QUERIES, key.shape[2])
            rows, columns = positions[start:stop, None], positions[:stop]
            allowed = columns <= rows if mask is None else mask[:, :, start:stop, :stop]
            by_value = columns < self._scheme.quantized_values(rows)
            by_key = columns < self._scheme.quantized_keys(rows)
            forms = (by_value, by_key & ~by_value, ~by_key)
            yield self._sdpa(
                module,
                query[:, :, start:stop],
                torch.cat([form[:, :, :stop] for form in (keys, keys, key)], dim=2),
                torch.cat([form[:, :, :stop] for form in (values, value, value)], dim=2),
                torch.cat([_where(allowed, form) for form in forms], dim=-1),
                **options,
            )[0]


def _where(allowed: Tensor, form: Tensor) -> Tensor:
    """A mask ``[.., .., rows, columns]``, true or added, that also wants ``form`` ``[rows, columns]``."""
    if allowed.dtype == torch.bool:
        both = allowed & form
        return both if both.dim() == 4 else both[None, None]
    return allowed.masked_fill(~form, -torch.inf)


class _Seen(Exception):
    """Keys and values have been seen: the rest of the block isn't needed."""


class _Watcher:
    """Notes the ranges of keys, as they are cached, and values instead of attending."""

    def __init__(self, rotation: OnlineRotation | None) -> None:
        self.rotation = rotation
        self.keys: list[tuple[float, float]] = []
        self.values: list[tuple[float, float]] = []

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        cached = key if self.rotation is None else self.rotation(key)
        for states, found in ((cached, self.keys), (value, self.values)):
            lo, hi = states.float().aminmax()
            found.append((float(lo), float(hi)))
        raise _Seen


def attending_to_cache(
    model: Any, kv: KvSpec | None, ranges: KvRanges | None, *, decode: bool, rotation: OnlineRotation | None = None
) -> AbstractContextManager[None]:
    """The context in which the blocks of ``model`` attend to a cache.

    Args:
        model: a transformers model.
        kv: the cache; None is one in full precision. So is a static one whose ranges aren't known yet: transforms run
            before they are calibrated.
        ranges: of the keys and values of the block that will be run.
        decode: act it out token by token.
        rotation: of queries and keys. Where keys aren't quantized it's left out, since nothing would come of it.

    Raises:
        ModelError: the model's attention can't be replaced.
    """
    scheme = None if kv is None or (kv.static and ranges is None) else kv.scheme(ranges)
    if scheme is None and not decode:
        return nullcontext()
    rotation = None if scheme is None else rotation
    return attending(model, CachedAttention(scheme, decode=decode, rotation=rotation))


def cache_ranges(model: Any, run: BlockRun, rotation: OnlineRotation | None = None) -> KvRanges:
    """Ranges of the keys and values that a block caches, over all its inputs, in full precision.

    Args:
        model: a transformers model.
        run: a block with its inputs.
        rotation: of the keys.

    Raises:
        ModelError: the block has no attention.
    """
    watcher = _Watcher(rotation)
    with attending(model, watcher):
        for batch in range(len(run.inputs)):
            try:
                run.forward(batch)
            except _Seen:
                continue
            raise ModelError("a block has no attention, so no KV cache", "remove quant.kvcache")
    limits = [(min(lo for lo, _ in found), max(hi for _, hi in found)) for found in (watcher.keys, watcher.values)]
    return KvRanges(*limits)
