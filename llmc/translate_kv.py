"""The KV cache's part of ``translate.py``: from ``quant.kvcache`` to its spec."""

from __future__ import annotations

import torch

from .config import Config
from .config.tensors import KvCacheConfig
from .errors import ConfigError
from .models import Heads
from .quant import Fp8Grid, IntGrid, KvSpec, PerGroup, PerTensor, PerToken

_FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def unavailable_cache(cache: KvCacheConfig | None) -> list[str]:
    """Keys of ``quant.kvcache`` that this version doesn't carry out."""
    if cache is None:
        return []
    missing = ["quant.kvcache.special"] if cache.special is not None else []
    missing += [f"quant.kvcache.{key}" for key in ("int_range", "float_range") if getattr(cache, key) is not None]
    if cache.calib_algo not in ("minmax", "static_minmax"):
        missing.append(f"quant.kvcache.calib_algo: {cache.calib_algo}")
    return missing


def make_kv(config: Config, heads: Heads) -> KvSpec | None:
    """How the KV cache is quantized; None if it isn't.

    Args:
        config: the whole configuration.
        heads: the model's attention.

    Raises:
        ConfigError: a group size doesn't divide a head, or there is no text to calibrate on.
    """
    cache = None if config.quant is None else config.quant.kvcache
    if cache is None:
        return None
    size = cache.group_size
    if size and heads.dim % size:
        fitting = [g for g in range(8, heads.dim + 1) if heads.dim % g == 0]
        raise ConfigError(
            f"quant.kvcache.group_size: {size} doesn't divide the {heads.dim} channels of a head",
            f"use {', '.join(map(str, fitting))}, or granularity: per_token",
        )
    if cache.static and config.calib is None:
        raise ConfigError(
            "quant.kvcache.static: ranges need calibration text, but there is no section 'calib'",
            "add calib with name, n_samples, seq_len and preproc, or set static: False",
        )
    kivi = cache.method == "Kivi"
    return KvSpec(
        method=cache.method,
        grid=_grid(cache, kivi),
        granularity=PerGroup(size) if size else PerTensor() if cache.granularity == "per_tensor" else PerToken(),
        residual=cache.residual_length if kivi else 0,
        static=cache.static,
    )


def _grid(cache: KvCacheConfig, kivi: bool) -> IntGrid | Fp8Grid:
    """Scales of integers are float16 unless the file says otherwise, those of floats float32, as engines have them."""
    scales = _DTYPES.get(cache.scale_dtype)
    if isinstance(cache.bit, str):
        return Fp8Grid(_FLOATS[cache.bit], scales or torch.float32)
    offset = not cache.symmetric and (kivi or not cache.round_zp)
    return IntGrid(cache.bit, cache.symmetric, offset, scales or torch.float16)
