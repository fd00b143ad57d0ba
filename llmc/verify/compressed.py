"""``quant_method: compressed-tensors``: its formats, and which module has which."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor

from ..errors import CheckpointError
from .layouts import (
    DENSE,
    E4M3,
    FLOATS,
    INT8,
    INT32,
    ONE,
    Layout,
    Part,
    Shape,
    finite_problems,
    range_problems,
    scale_problems,
)

_PACKED, _INT, _FLOAT, _NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
_NVFP4, _MXFP4, _MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
FORMATS = (_PACKED, _INT, _FLOAT, _NAIVE, _NVFP4, _MXFP4, _MXFP8)
_BYTES = frozenset({torch.uint8})
_EXPONENTS = frozenset({torch.uint8, torch.float8_e8m0fnu})
_NO_EXPONENT = 255  # NaN in E8M0
_INDEX = "weight_g_idx"


@dataclass(frozen=True)
class CompressedLinear:
    """A Linear in one of the formats.

    Attributes:
        format: its name.
        weights: the grid of the weight.
        inputs: that of the input; None if it isn't rounded.
    """

    format: str
    weights: QuantizationArgs
    inputs: QuantizationArgs | None

    def describe(self) -> str:
        """Format, bits and what shares a scale."""
        grid = f"{self.weights.num_bits} bits {self.weights.type}, {self.weights.strategy}"
        return f"{self.format} ({grid}{f' of {self.weights.group_size}' if self.weights.group_size else ''})"

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """By the format's own table."""
        scales = self._scale_shapes(rows, columns)
        return self._codes(rows, columns) | self._zero_points(rows, scales) | self._scales(scales) | self._inputs()

    def problems(self, stored: Mapping[str, Tensor], shape: Shape) -> Iterator[tuple[str, str]]:
        """Scales that are no numbers, or 0; codes and zero points outside of their grid; another ``weight_shape``."""
        for part in ("weight_scale", "weight_global_scale", "input_scale", "input_global_scale"):
            if part in stored:
                yield from self._scale_problems(part, stored[part])
        low, high = -(1 << (self.weights.num_bits - 1)), (1 << (self.weights.num_bits - 1)) - 1
        for part in ("weight", "weight_zero_point"):
            if part in stored and stored[part].dtype == torch.int8:
                yield from range_problems(part, stored[part], low, high, "codes" if part == "weight" else "zero points")
        if "weight" in stored and stored["weight"].is_floating_point():
            yield from finite_problems("weight", stored["weight"])
        if "weight_shape" in stored and tuple(stored["weight_shape"].tolist()) != shape:
            yield "weight_shape", f"says {stored['weight_shape'].tolist()}, and the model has {list(shape)}"

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor | None:
        """compressed-tensors' own decompression; it doesn't know of an index of groups."""
        if _INDEX in stored:
            return None
        compressor = BaseCompressor.get_value_from_registry(self.format)
        scheme = QuantizationScheme(targets=["Linear"], weights=self.weights, input_activations=self.inputs)
        dense: Tensor = compressor.decompress(dict(stored), scheme)["weight"]
        return dense

    @property
    def shared(self) -> tuple[str, ...]:
        """Scales of the one input, and NVFP4's scale of the whole weight."""
        return ("input_scale", "input_zero_point", "input_global_scale", "weight_global_scale")

    def _codes(self, rows: int, columns: int) -> dict[str, Part]:
        if self.format == _PACKED:
            words = -(-columns * self.weights.num_bits // 32)
            return {
                "weight_packed": Part(((rows, words),), INT32),
                "weight_shape": Part(((2,),), frozenset({torch.int64, torch.int32})),
                _INDEX: Part(((columns,),), INT32, optional=True),
            }
        if self.format in (_NVFP4, _MXFP4):
            return {"weight_packed": Part(((rows, columns // 2),), _BYTES)}
        floating = self.weights.type == "float"
        return {"weight": Part(((rows, columns),), E4M3 if floating else INT8)}

    def _scale_shapes(self, rows: int, columns: int) -> tuple[Shape, ...]:
        strategy, size = str(self.weights.strategy), self.weights.group_size or columns
        if strategy == "tensor":
            return ONE
        if strategy == "channel":
            return ((rows, 1), (rows,))
        if strategy == "block" and self.weights.block_structure:
            high, wide = self.weights.block_structure
            return ((-(-rows // high), -(-columns // wide)),)
        return ((rows, math.ceil(columns / size)),)

    def _scales(self, shapes: tuple[Shape, ...]) -> dict[str, Part]:
        if self.format in (_MXFP4, _MXFP8):
            return {"weight_scale": Part(shapes, _EXPONENTS)}
        if self.format == _NVFP4:
            return {
                "weight_scale": Part(shapes, E4M3),
                "weight_global_scale": Part(ONE, frozenset({torch.float32})),
            }
        return {"weight_scale": Part(shapes, FLOATS)}

    def _zero_points(self, rows: int, scales: tuple[Shape, ...]) -> dict[str, Part]:
        if self.weights.symmetric:
            return {}
        if self.format != _PACKED:
            return {"weight_zero_point": Part(scales, INT8)}
        words = -(-rows * self.weights.num_bits // 32)
        return {"weight_zero_point": Part(tuple((words, *shape[1:]) for shape in scales), INT32)}

    def _inputs(self) -> dict[str, Part]:
        if self.inputs is None or self.inputs.dynamic is True:
            return {}
        if self.inputs.dynamic is not False:  # "local": scales of groups over a static one
            return {"input_global_scale": Part(ONE, frozenset({torch.float32}))}
        zero = {} if self.inputs.symmetric else {"input_zero_point": Part(ONE, INT8)}
        return {"input_scale": Part(ONE, FLOATS), **zero}

    def _scale_problems(self, part: str, scale: Tensor) -> Iterator[tuple[str, str]]:
        if scale.dtype == torch.uint8:
            yield from range_problems(part, scale.int(), 0, _NO_EXPONENT - 1, "exponents")
        elif scale.dtype == torch.float8_e8m0fnu:
            yield from finite_problems(part, scale)
        else:
            yield from scale_problems(part, scale)


class CompressedTensors:
    """Which module is stored how, by ``config_groups`` and ``ignore``.

    Raises:
        CheckpointError: the library doesn't understand the section, or a format isn't known here.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        try:
            self._config = QuantizationConfig.model_validate(dict(content))
        except (ValueError, NotImplementedError, KeyError) as problem:
            raise CheckpointError(f"compressed-tensors doesn't understand quantization_config: {problem}") from problem
        self._groups = [group for group in self._config.config_groups.values() if isinstance(group, QuantizationScheme)]
        unknown = [name for group in self._groups if (name := self._format(group)) not in FORMATS and group.weights]
        if unknown:
            raise CheckpointError(
                f"quantization_config: format {unknown[0]} isn't known here", f"known are {', '.join(FORMATS)}"
            )

    def layout(self, name: str, kind: str, stored: Sequence[str]) -> Layout:
        """Of a module by its name and class; ``stored`` are the parts that there are."""
        if any(_named(name, pattern) or pattern == kind for pattern in self._config.ignore or ()):
            return DENSE
        group = self._group(name, kind)
        if group is None or group.weights is None:
            return DENSE
        return CompressedLinear(self._format(group), group.weights, group.input_activations)

    def names(self) -> list[str]:
        """Modules that ``ignore`` and the targets name exactly."""
        named = [*(self._config.ignore or ()), *(target for group in self._groups for target in group.targets)]
        return [name for name in named if not name.startswith("re:") and "." in name]

    def cache_parts(self) -> tuple[str, ...]:
        """What is stored beside each attention."""
        cache = self._config.kv_cache_scheme
        return ("k_scale", "v_scale") if cache is not None and cache.dynamic is False else ()

    def _group(self, name: str, kind: str) -> QuantizationScheme | None:
        """Exact names go before patterns, and those before classes, as all readers have it."""
        for fits in (_is_name, _is_pattern, _is_class):
            for group in self._groups:
                if any(fits(target, name, kind) for target in group.targets):
                    return group
        return None

    def _format(self, group: QuantizationScheme) -> str:
        found = group.format or self._config.format
        return str(getattr(found, "value", found))


def _named(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern == name


def _is_name(target: str, name: str, kind: str) -> bool:
    return target == name


def _is_pattern(target: str, name: str, kind: str) -> bool:
    return target.startswith("re:") and _named(name, target)


def _is_class(target: str, name: str, kind: str) -> bool:
    return target == kind
