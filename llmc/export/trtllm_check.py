"""What TensorRT-LLM's loaders ask of a folder, as a check that needs no TensorRT-LLM.

Rules are those of ``_torch/modules/linear.py`` and ``_torch/model_config.py`` of August 2026: the tensors that each
method reads, their shapes, what Linears that are run as one must have in common, and what both configuration files say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .modelopt_layouts import ALGORITHMS, FP8, NVFP4, W4A8, Algorithm
from .trtllm import CACHE_NAMES
from .trtllm_config import HF_QUANT_CONFIG, MIXED

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CODES = {"FP8": torch.float8_e4m3fn, "FP8_PER_CHANNEL_PER_TOKEN": torch.float8_e4m3fn, "W8A16": torch.int8}
_EQUAL = {FP8: ("input_scale", "weight_scale"), W4A8: ("input_scale", "weight_scale_2")}
_EQUAL[NVFP4] = _EQUAL[W4A8]


@dataclass(frozen=True)
class Quantization:
    """What the configuration files say.

    Attributes:
        default: the algorithm of every Linear that isn't excluded; None: none has one, or each its own.
        by_name: those of mixed checkpoints.
        excluded: patterns of modules that aren't quantized.
        cache: whether the KV cache is FP8.
        dtype: the model's.
    """

    default: Algorithm | None
    by_name: Mapping[str, Algorithm]
    excluded: tuple[str, ...]
    cache: bool
    dtype: torch.dtype | None

    def algorithm(self, name: str) -> Algorithm | None:
        """That of a Linear by its name."""
        if any(fnmatchcase(name, pattern) for pattern in self.excluded):
            return None
        return self.by_name.get(name, self.default)


def check_trtllm(folder: Path) -> list[str]:
    """All that keeps TensorRT-LLM from loading a folder as it was written; empty if nothing does.

    Args:
        folder: a whole checkpoint in ModelOpt's unified layout.

    Raises:
        OSError: a file is missing.
        ValueError: a configuration isn't JSON.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = json.loads((folder / HF_QUANT_CONFIG).read_text(encoding="utf-8"))["quantization"]
    problems = list(_configurations(config.get("quantization_config", {}), stored))
    if problems:
        return problems
    found = _read(config, stored)
    tensors = _Tensors(folder)
    for name in tensors.modules:
        problems += _linear(name, found, tensors.of(name))
    for group in _fused(tensors.modules):
        problems += _shared(group, found, tensors)
    return [*problems, *_cache(found, tensors)]


class _Tensors:
    """The tensors of a folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._files: list[Any] = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118
        self._parts: dict[str, list[str]] = {}
        for name in self._where:
            self._parts.setdefault(name.rpartition(".")[0], []).append(name)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return sorted(self._where)

    @property
    def modules(self) -> list[str]:
        """Of all modules that have any."""
        return sorted(self._parts)

    def get(self, name: str) -> Tensor | None:
        """One tensor, if it is there."""
        tensor: Tensor | None = self._where[name].get_tensor(name) if name in self._where else None
        return tensor

    def of(self, module: str) -> dict[str, Tensor]:
        """A module's own tensors."""
        return {name.rpartition(".")[2]: self._where[name].get_tensor(name) for name in self._parts[module]}


def _configurations(ours: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterator[str]:
    """Both files must say the same, and nothing that the backend doesn't know."""
    if ours.get("quant_method") != "modelopt":
        yield "config.json: quantization_config.quant_method isn't modelopt"
    for key in ("quant_algo", "quantized_layers"):
        if ours.get(key) != stored.get(key):
            yield f"config.json and {HF_QUANT_CONFIG} differ in {key}"
    if (ours.get("kv_cache_scheme") is not None) != (stored.get("kv_cache_quant_algo") is not None):
        yield f"config.json and {HF_QUANT_CONFIG} differ in the KV cache"
    mixed = stored.get("quant_algo") == MIXED
    settings = list(stored["quantized_layers"].values()) if mixed else [stored]
    for one in settings:
        algorithm = ALGORITHMS.get(str(one.get("quant_algo")))
        if algorithm is None and one.get("quant_algo") is not None:
            yield f"{HF_QUANT_CONFIG}: there is no method for {one.get('quant_algo')}"
        if algorithm is not None and algorithm.group != one.get("group_size"):
            yield f"{HF_QUANT_CONFIG}: {algorithm.name} with group_size {one.get('group_size')}"
        if one.get("has_zero_point"):
            yield f"{HF_QUANT_CONFIG}: has_zero_point is true, and no method reads zero points"
    if stored.get("kv_cache_quant_algo") not in (None, "FP8"):
        yield f"{HF_QUANT_CONFIG}: kv_cache_quant_algo {stored['kv_cache_quant_algo']}"


def _read(config: Mapping[str, Any], stored: Mapping[str, Any]) -> Quantization:
    by_name = {name: ALGORITHMS[one["quant_algo"]] for name, one in stored.get("quantized_layers", {}).items()}
    dtype = config.get("dtype", config.get("torch_dtype"))
    return Quantization(
        default=ALGORITHMS.get(str(stored.get("quant_algo"))),
        by_name=by_name,
        excluded=tuple(stored.get("exclude_modules") or ()),
        cache=stored.get("kv_cache_quant_algo") is not None,
        dtype=_DTYPES.get(str(dtype)),
    )


def _linear(name: str, found: Quantization, own: Mapping[str, Tensor]) -> Iterator[str]:
    """One Linear's tensors: all that its method reads, of the shape that it copies them into."""
    weight = own.get("weight")
    if weight is None or weight.dim() != 2:
        return
    algorithm = found.algorithm(name)
    if algorithm is None:
        if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
            yield f"{name}.weight is {weight.dtype}, but nothing says that it is quantized"
        return
    needed = _expected(name, algorithm, found, weight)
    for part, (dtype, shape) in needed.items():
        tensor = own.get(part)
        if tensor is None:
            yield f"{name}.{part} is missing, which {algorithm.name} reads"
        elif (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            yield f"{name}.{part} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape} ({algorithm.name})"
    if algorithm.group is not None and _columns(algorithm, weight) % algorithm.group:
        yield f"{name}: groups of {algorithm.group} don't divide its {_columns(algorithm, weight)} input channels"


def _columns(algorithm: Algorithm, weight: Tensor) -> int:
    return weight.shape[1] * (2 if algorithm is NVFP4 else 1)


def _expected(
    name: str, algorithm: Algorithm, found: Quantization, weight: Tensor
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor that the method reads, of a Linear with this weight."""
    columns = _columns(algorithm, weight)
    rows = weight.shape[0] * (2 if algorithm.smooth else 1)
    groups = columns // (algorithm.group or columns)
    whole: tuple[torch.dtype, tuple[int, ...]] = (torch.float32, ())
    scales: tuple[int, ...] = (rows,) if algorithm.group is None else (rows, groups)
    needed = {
        "weight": (_CODES.get(algorithm.name, torch.uint8), tuple(weight.shape)),
        "weight_scale": (torch.float8_e4m3fn if algorithm is NVFP4 else torch.float32, scales),
    }
    needed |= {"weight_scale": whole} if algorithm is FP8 else {}
    needed |= {"weight_scale_2": whole} if algorithm.scaled else {}
    needed |= {"input_scale": whole} if algorithm in _EQUAL else {}
    alone = not any(name.rpartition(".")[2] in group for group in _FUSED)
    if algorithm.smooth and alone:
        needed["pre_quant_scale"] = (found.dtype or torch.bfloat16, (columns,))
    return needed


def _fused(modules: list[str]) -> Iterator[list[str]]:
    """Linears that are run as one."""
    known = set(modules)
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        for group in _FUSED:
            names = [f"{parent}.{other}" for other in group]
            if leaf == group[0] and known.issuperset(names):
                yield names


def _shared(group: list[str], found: Quantization, tensors: _Tensors) -> Iterator[str]:
    algorithms = {found.algorithm(name) for name in group}
    if len(algorithms) > 1:
        yield f"{', '.join(group)} are run as one and have different algorithms"
        return
    for algorithm in algorithms:
        for part in _EQUAL.get(algorithm, ()) if algorithm is not None else ():
            values = {float(scale) for name in group if (scale := tensors.get(f"{name}.{part}")) is not None}
            if len(values) > 1:
                yield f"{', '.join(group)} are run as one and have different {part}: {sorted(values)}"


def _cache(found: Quantization, tensors: _Tensors) -> Iterator[str]:
    """Scales of keys and values come together, each a scalar."""
    names, (key, value) = set(tensors.names), CACHE_NAMES.values()
    for name in tensors.names:
        if not name.endswith((key, value)):
            continue
        if not found.cache:
            yield f"{name} is there, but kv_cache_quant_algo isn't"
        if not names.issuperset({name.replace(key, value), name.replace(value, key)}):
            yield f"{name} is there without its pair"
        tensor = tensors.get(name)
        if tensor is not None and (tensor.dtype, tuple(tensor.shape)) != (torch.float32, ()):
            yield f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not a float32 scalar"
