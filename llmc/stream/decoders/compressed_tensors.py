"""Checkpoints of the compressed-tensors library (``quant_method: compressed-tensors``), by its own decompressors.

A module's tensors tell whether it is quantized, its name and the groups of ``config.json`` how. What is said there of
activations and the KV cache isn't a property of the weights, and is left behind with its scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_targets
from pydantic import ValidationError
from torch import Tensor, nn

from ...errors import CheckpointError
from ..decoding import Decoded, DenseEntry, Entry, Stage, misshapen, missing
from ..headers import TensorEntry
from ..source import read_tensor

_PACKED, _WEIGHT, _SCALE, _SHAPE = "weight_packed", "weight", "weight_scale", "weight_shape"
_PARTS = (_SCALE, "weight_zero_point", "weight_global_scale", _SHAPE)
_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)
_ORIGINAL = "give the original, unquantized checkpoint as model.path"


@dataclass(frozen=True)
class _Module:
    """Decompresses one module's weight."""

    name: str
    scheme: QuantizationScheme
    format: str
    dtype: torch.dtype

    def __call__(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {name.removeprefix(f"{self.name}."): tensor for name, tensor in stored.items()}
        if own[_SCALE].dtype == torch.float8_e8m0fnu:
            own[_SCALE] = own[_SCALE].view(torch.uint8)  # the library takes exponents
        dense: Tensor = BaseCompressor.get_value_from_registry(self.format).decompress(own, self.scheme)[_WEIGHT]
        return {f"{self.name}.{_WEIGHT}": dense.to(self.dtype, copy=True)}


def compressed_stage(entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any], dtype: torch.dtype) -> Stage:
    """Dense weights of all quantized modules in ``dtype``.

    Raises:
        CheckpointError: a format or a module that can't be decoded, scales that are missing or don't fit.
    """
    config = _config(quantization)
    modules = [name.rpartition(".")[0] for name, entry in entries.items() if _is_coded(name, entry, entries)]
    decoded: list[Decoded] = []
    formats: dict[str, None] = {}
    for module in dict.fromkeys(modules):
        scheme = _scheme_of(module, config)
        kind = _format_of(module, scheme, config)
        made, sources = _plan(module, scheme, kind, entries, dtype)
        formats[f"{kind} ({_bits(scheme)})"] = None
        decoded.append(Decoded((made,), sources, _Module(module, scheme, kind, dtype)))
    if not decoded:
        return Stage(())
    kinds = " and ".join(formats)
    return Stage(tuple(decoded), f"compressed-tensors {kinds}, decoded to {str(dtype).removeprefix('torch.')}")


def _config(quantization: Mapping[str, Any]) -> QuantizationConfig:
    """The library's view of it, without what can't be taken into dense weights."""
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise CheckpointError(f"its weights are stored sparsely ({sparsity}), which isn't supported", _ORIGINAL)
    if (quantization.get("transform_config") or {}).get("config_groups"):
        raise CheckpointError(
            "its quantization_config has a transform_config: the model rotates activations while it runs, and dense "
            "weights alone would be another model",
            _ORIGINAL,
        )
    try:
        return QuantizationConfig.model_validate(dict(quantization))
    except ValidationError as problem:
        said = problem.errors()[0]
        place = ".".join(map(str, said["loc"]))
        raise CheckpointError(
            f"config.json: quantization_config.{place}: {said['msg']}", "is it of a newer compressed-tensors?"
        ) from problem


def _is_coded(name: str, entry: Entry, entries: Mapping[str, Entry]) -> bool:
    """Whether a tensor is what a quantized module has instead of its weight.

    Raises:
        CheckpointError: it is a dense weight with scales: somebody would round it only when the model runs.
    """
    module, _, part = name.rpartition(".")
    narrow = entry.dtype in (torch.int8, torch.float8_e4m3fn)
    if part == _WEIGHT and not narrow and f"{module}.{_SCALE}" in entries:
        raise CheckpointError(f"{name} has scales ({_SCALE}), and isn't compressed with them", _ORIGINAL)
    return part == _PACKED or (part == _WEIGHT and narrow)


def _scheme_of(module: str, config: QuantizationConfig) -> QuantizationScheme:
    """The group that names a module most exactly: by its name, by an expression, by its class."""
    found: list[tuple[int, QuantizationScheme]] = []
    for scheme in config.config_groups.values():
        if not isinstance(scheme, QuantizationScheme) or scheme.weights is None:
            continue
        matched = [target for probe in _probes() for target in match_targets(module, probe, scheme.targets)]
        if matched:
            exact = module in matched
            found.append((0 if exact else 1 if any(one.startswith("re:") for one in matched) else 2, scheme))
    if not found:
        raise CheckpointError(
            f"{module} is quantized, and no group of quantization_config in config.json names it",
            "do config.json and the weights belong together? fetch both again",
        )
    return min(found, key=lambda pair: pair[0])[1]


@cache
def _probes() -> tuple[nn.Module, ...]:
    """Modules of the classes whose weights the library compresses."""
    with torch.device("meta"):
        return nn.Linear(1, 1), nn.Embedding(1, 1)


def _format_of(module: str, scheme: QuantizationScheme, config: QuantizationConfig) -> str:
    kind = scheme.format or config.format
    if kind in (None, "mixed-precision"):
        kind = infer_module_format(nn.Linear, scheme)
    name = str(getattr(kind, "value", kind))
    if name not in _FORMATS:
        raise CheckpointError(f"{module} is stored as {name}, which isn't supported as an input", _ORIGINAL)
    return name


def _plan(
    module: str, scheme: QuantizationScheme, kind: str, entries: Mapping[str, TensorEntry], dtype: torch.dtype
) -> tuple[DenseEntry, tuple[str, ...]]:
    """The dense weight and what it's made of."""
    first = f"{module}.{_PACKED if 'pack' in kind else _WEIGHT}"
    scale, weights = entries.get(f"{module}.{_SCALE}"), scheme.weights
    if first not in entries or scale is None or weights is None:
        raise missing(f"{module}.{_WEIGHT}", first if first not in entries else f"{module}.{_SCALE}")
    if f"{module}.weight_g_idx" in entries:
        raise CheckpointError(
            f"{module}: its groups aren't runs of columns (weight_g_idx), which isn't supported", _ORIGINAL
        )
    for part, wanted in (("weight_zero_point", not weights.symmetric), ("weight_global_scale", "nvfp4" in kind)):
        if wanted and f"{module}.{part}" not in entries:
            raise missing(f"{module}.{_WEIGHT}", f"{module}.{part}")
    shape = _shape(module, kind, entries)
    _check_scale(module, shape, scheme, scale)
    sources = [first, *(f"{module}.{part}" for part in _PARTS if f"{module}.{part}" in entries)]
    return DenseEntry(f"{module}.{_WEIGHT}", dtype, shape), tuple(sources)


def _shape(module: str, kind: str, entries: Mapping[str, TensorEntry]) -> tuple[int, ...]:
    """``[out, in]``. Words may be padded: what they hold is stored beside them, two numbers that are read at once."""
    if kind == "pack-quantized":
        said = entries.get(f"{module}.{_SHAPE}")
        if said is None:
            raise missing(f"{module}.{_WEIGHT}", f"{module}.{_SHAPE}")
        return tuple(int(size) for size in read_tensor(said).tolist())
    if "pack" in kind:
        rows, columns = entries[f"{module}.{_PACKED}"].shape
        return rows, 2 * columns
    return entries[f"{module}.{_WEIGHT}"].shape


def _check_scale(module: str, shape: tuple[int, ...], scheme: QuantizationScheme, scale: Entry) -> None:
    """Refuse scales that aren't one for each tensor, row, group or block."""
    weights, name = scheme.weights, f"{module}.{_WEIGHT}"
    if weights is None or len(shape) != 2:
        raise misshapen(name, shape, scale.name, scale.shape, "a matrix")
    rows, columns = shape
    strategy = str(getattr(weights.strategy, "value", weights.strategy))
    wanted: tuple[tuple[int, ...], ...]
    if strategy == "tensor":
        wanted = ((1,), (), (1, 1))
    elif strategy == "channel":
        wanted = ((rows, 1), (rows,))
    elif strategy == "block" and weights.block_structure is not None:
        high, wide = weights.block_structure
        wanted = ((-(-rows // high), -(-columns // wide)),)
    elif weights.group_size:
        wanted = ((rows, -(-columns // weights.group_size)),)
    else:
        raise CheckpointError(f"{name} has scales by {strategy}, which isn't supported", _ORIGINAL)
    if scale.shape not in wanted:
        raise misshapen(name, shape, scale.name, scale.shape, f"{list(wanted[0])} ({strategy})")


def _bits(scheme: QuantizationScheme) -> str:
    weights = scheme.weights
    return "" if weights is None else f"{weights.type}{weights.num_bits}"
