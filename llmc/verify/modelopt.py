"""``quant_method: modelopt``: the unified layout of nvidia-modelopt, for TensorRT-LLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from torch import Tensor

from ..errors import CheckpointError
from .layouts import DENSE, E4M3, FLOATS, INT8, ONE, Layout, Part, Shape, finite_problems, scale_problems

_F32 = frozenset({torch.float32})
_BYTES = frozenset({torch.uint8})
_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
_MIXED = "MIXED_PRECISION"


def _as_they_are(stored: Tensor) -> Tensor:
    return stored.float()


def _rows(stored: Tensor) -> Tensor:
    """Two rows a byte, the even one low, two's complement."""
    halves = torch.stack([stored & 15, stored >> 4], dim=1).flatten(0, 1).float()
    return torch.where(halves > 7, halves - 16, halves)


def _pairs(stored: Tensor) -> Tensor:
    """Two columns of FP4 a byte, the even one low."""
    values: Tensor = unpack_fp4_from_uint8(stored, stored.shape[0], 2 * stored.shape[1])
    return values.float()


@dataclass(frozen=True)
class Algorithm:
    """What an algorithm stores.

    Attributes:
        codes: dtypes of ``weight``.
        unpack: from it to the codes ``[out, in]``.
        rows: rows of the weight in one of ``weight``.
        columns: columns in one of it.
        group: columns that share a scale; 0: all of a row; None: the whole tensor.
        whole: whether there is a ``weight_scale_2`` of the tensor.
        inputs: whether there is an ``input_scale``.
        smooth: whether there may be a ``pre_quant_scale``.
    """

    codes: frozenset[torch.dtype]
    unpack: Callable[[Tensor], Tensor]
    rows: int = 1
    columns: int = 1
    group: int | None = 0
    whole: bool = False
    inputs: bool = False
    smooth: bool = False


_ALGORITHMS = {
    "W4A16_AWQ": Algorithm(_BYTES, _rows, rows=2, group=128, smooth=True),
    "W4A8_AWQ": Algorithm(_BYTES, _rows, rows=2, group=128, whole=True, inputs=True, smooth=True),
    "FP8": Algorithm(E4M3, _as_they_are, group=None, inputs=True),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm(E4M3, _as_they_are),
    "W8A16": Algorithm(INT8, _as_they_are),
    "NVFP4": Algorithm(_BYTES, _pairs, columns=2, group=16, whole=True, inputs=True),
}


@dataclass(frozen=True)
class ModelOptLinear:
    """A Linear by one of the algorithms.

    Attributes:
        name: the algorithm's.
        group: columns that share a scale, where the file says another number than is usual.
    """

    name: str
    group: int | None

    def describe(self) -> str:
        """The algorithm."""
        return f"modelopt ({self.name})"

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """``weight``, its scales, and those of the input."""
        own = self._own
        found = {
            "weight": Part(((rows // own.rows, columns // own.columns),), own.codes),
            "weight_scale": Part(self._scales(rows, columns), E4M3 if self.name == "NVFP4" else _F32),
        }
        found |= {"weight_scale_2": Part(ONE, _F32)} if own.whole else {}
        found |= {"input_scale": Part(ONE, _F32)} if own.inputs else {}
        return found | ({"pre_quant_scale": Part(((columns,),), FLOATS, optional=True)} if own.smooth else {})

    def problems(self, stored: Mapping[str, Tensor], shape: Shape) -> Iterator[tuple[str, str]]:
        """Scales and FP8 codes that are no numbers, and scales of 0."""
        if stored["weight"].is_floating_point():
            yield from finite_problems("weight", stored["weight"])
        for part in _SCALES:
            if part in stored:
                yield from scale_problems(part, stored[part])

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor | None:
        """Codes times scales, in float32. W4A8's second scale belongs to its products in FP8, not to the weight."""
        codes, scale = self._own.unpack(stored["weight"]), stored["weight_scale"].float()
        if self.name == "NVFP4":
            scale = scale * stored["weight_scale_2"].float()
        if scale.ndim == 1:
            scale = scale[:, None]
        if scale.ndim == 2 and self._own.group:
            scale = scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
        smooth = stored.get("pre_quant_scale")
        dense = codes * scale
        return dense if smooth is None else dense * smooth.float()

    @property
    def shared(self) -> tuple[str, ...]:
        """Scales that a backend keeps one of."""
        return ("input_scale", "weight_scale_2", *(("weight_scale",) if self._own.group is None else ()))

    @property
    def _own(self) -> Algorithm:
        return _ALGORITHMS[self.name]

    def _scales(self, rows: int, columns: int) -> tuple[Shape, ...]:
        if self._own.group is None:
            return ONE
        if not self._own.group:
            return ((rows,), (rows, 1))
        return ((rows, -(-columns // (self.group or self._own.group))),)


class ModelOpt:
    """Which module is stored how: all Linears alike, or each by its name, but for those that patterns leave out.

    Raises:
        CheckpointError: an algorithm isn't known here.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._ignored: list[str] = list(content.get("ignore") or content.get("exclude_modules") or ())
        named = content.get("quantized_layers") or {}
        self._named = {name: self._layout(one) for name, one in named.items()}
        whole = content.get("quant_algo")
        self._all = None if whole in (None, _MIXED) else self._layout(content)
        self._cache = content.get("kv_cache_scheme") is not None or content.get("kv_cache_quant_algo") is not None

    def layout(self, name: str, kind: str, stored: Sequence[str]) -> Layout:
        """Of a module by its name and class; ``stored`` are the parts that there are."""
        if kind != "Linear" or any(fnmatchcase(name, pattern) for pattern in self._ignored):
            return DENSE
        return self._named.get(name) or self._all or DENSE

    def names(self) -> list[str]:
        """Modules that are named exactly."""
        named = [*self._named, *self._ignored]
        return [name for name in named if "." in name and not set(name) & set("*?[")]

    def cache_parts(self) -> tuple[str, ...]:
        """What is stored below each attention."""
        return ("k_proj.k_scale", "v_proj.v_scale") if self._cache else ()

    def _layout(self, content: Mapping[str, Any]) -> ModelOptLinear:
        name = str(content.get("quant_algo"))
        if name not in _ALGORITHMS:
            raise CheckpointError(f"quant_algo {name} isn't known here", f"known are {', '.join(_ALGORITHMS)}")
        return ModelOptLinear(name, content.get("group_size"))
