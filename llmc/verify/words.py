"""``quant_method`` awq, gptq and fp8: one scheme for all Linears, but for some that stay as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..export import EXPORTERS
from ..quant import PerBlock, PerChannel, PerGroup, PerTensor, QuantSpec, QWeight
from .layouts import DENSE, E4M3, FLOATS, INT32, ONE, Layout, Part, Shape, finite_problems, scale_problems

_HALF = frozenset({torch.float16, torch.bfloat16})
_AWQ_BITS, _GPTQ_BITS = (4,), (2, 3, 4, 8)


@dataclass(frozen=True)
class Words:
    """Codes in 32-bit words, scales ``[groups, out]``: AWQ packs along the outputs, GPTQ along the inputs.

    Attributes:
        method: ``awq`` or ``gptq``.
        bits: of a code.
        group: inputs that share a scale; -1: all of them.
        symmetric: whether zero points say nothing.
    """

    method: str
    bits: int
    group: int
    symmetric: bool

    def describe(self) -> str:
        """Method, bits, group size."""
        return f"{self.method} ({self.bits} bits, {'channel' if self.group < 0 else f'group of {self.group}'})"

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """``qweight``, ``qzeros``, ``scales``; of GPTQ ``g_idx`` too, which not every writer leaves there."""
        groups, words = -(-columns // self._size(columns)), rows * self.bits // 32
        packed = (columns, words) if self.method == "awq" else (columns * self.bits // 32, rows)
        index = {"g_idx": Part(((columns,),), INT32, optional=True)} if self.method == "gptq" else {}
        return {
            "qweight": Part((packed,), INT32),
            "qzeros": Part(((groups, words),), INT32),
            "scales": Part(((groups, rows),), _HALF),
            **index,
        }

    def problems(self, stored: Mapping[str, Tensor], shape: Shape) -> Iterator[tuple[str, str]]:
        """Scales that are no numbers, or 0; groups that aren't there."""
        yield from scale_problems("scales", stored["scales"])
        if "g_idx" in stored and stored["g_idx"].numel():
            index, groups = stored["g_idx"], stored["scales"].shape[0]
            if int(index.min()) < 0 or int(index.max()) >= groups:
                yield "g_idx", f"has groups {int(index.min())} to {int(index.max())}, and there are {groups}"

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor | None:
        """As llmc's exporter of the format reads it back; None without one, and of grids that it doesn't write."""
        kind = next((kind for kind in EXPORTERS if kind.name == f"save_auto{self.method}"), None)
        columns = stored["qweight"].shape[0] if self.method == "awq" else stored["qweight"].shape[0] * 32 // self.bits
        ordered = torch.arange(columns, dtype=torch.int32) // self._size(columns)
        scattered = "g_idx" in stored and not torch.equal(stored["g_idx"], ordered)
        if kind is None or scattered or (self.method == "gptq" and not self.symmetric):
            return None
        grain = PerChannel() if self.group < 0 else PerGroup(self.group)
        dtype = stored["scales"].dtype
        spec = QuantSpec(self.bits, self.symmetric, grain, scale_dtype=dtype)
        parts = {"g_idx": ordered, **stored} if self.method == "gptq" else stored
        record = kind(spec, dtype, torch.float32).read({f"linear.{part}": tensor for part, tensor in parts.items()})
        return record.quantized["linear"].dequantize(dtype)

    @property
    def shared(self) -> tuple[str, ...]:
        """Nothing: every group has its own."""
        return ()

    def _size(self, columns: int) -> int:
        return columns if self.group < 0 else self.group


@dataclass(frozen=True)
class Fp8:
    """FP8 weights with ``weight_scale_inv``, which they are multiplied by, one for each block or one for all.

    Attributes:
        block: rows and columns of a block; None: the tensor has one scale.
        static: whether the input has a stored scale.
    """

    block: tuple[int, int] | None
    static: bool

    def describe(self) -> str:
        """What shares a scale."""
        return f"fp8 ({'tensor' if self.block is None else f'blocks of {self.block[0]} x {self.block[1]}'})"

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """``weight``, ``weight_scale_inv`` and, if static, ``input_scale``."""
        shapes = ONE if self.block is None else ((-(-rows // self.block[0]), -(-columns // self.block[1])),)
        return {
            "weight": Part(((rows, columns),), E4M3),
            "weight_scale_inv": Part(shapes, FLOATS),
            **({"input_scale": Part(ONE, FLOATS)} if self.static else {}),
        }

    def problems(self, stored: Mapping[str, Tensor], shape: Shape) -> Iterator[tuple[str, str]]:
        """Scales and codes that are no numbers, scales of 0."""
        yield from finite_problems("weight", stored["weight"])
        for part in ("weight_scale_inv", "input_scale"):
            if part in stored:
                yield from scale_problems(part, stored[part])

    def dense(self, stored: Mapping[str, Tensor]) -> Tensor | None:
        """Codes times scales in float32; None for blocks that aren't squares."""
        if self.block is not None and self.block[0] != self.block[1]:
            return None
        grain = PerTensor() if self.block is None else PerBlock(self.block[0])
        spec, codes = QuantSpec.floating("e4m3", grain), stored["weight"]
        shape = spec.scale_shape(codes.shape[0], codes.shape[1])
        return QWeight(codes, stored["weight_scale_inv"].float().reshape(shape), None, spec).dequantize()

    @property
    def shared(self) -> tuple[str, ...]:
        """The scale of the one input."""
        return ("input_scale",)


class Uniform:
    """One layout for every Linear but those that are named, and those that plainly are dense where nobody is.

    Args:
        layout: of the others.
        kept: names, or parts of names, of those that stay; None: the tensors tell.
        patterns: regular expressions of those that stay.
    """

    def __init__(self, layout: Layout, kept: Sequence[str] | None, patterns: Sequence[str] = ()) -> None:
        self._layout, self._kept, self._patterns = layout, kept, patterns

    def layout(self, name: str, kind: str, stored: Sequence[str]) -> Layout:
        """Of a module by its name and class; ``stored`` are the parts that there are."""
        kept = any(part in name for part in self._kept or ()) or name.endswith("lm_head")
        kept = kept or any(re.search(pattern, name) for pattern in self._patterns)
        told_by_tensors = self._kept is None and list(stored) == ["weight"]
        return DENSE if kind != "Linear" or kept or told_by_tensors else self._layout

    def names(self) -> list[str]:
        """Modules that are named in full."""
        return [name for name in self._kept or () if "." in name and not name.endswith(".")]

    def cache_parts(self) -> tuple[str, ...]:
        """Nothing."""
        return ()


def read_awq(content: Mapping[str, Any]) -> Uniform:
    """``quant_method: awq``."""
    bits, group = _number(content, "bits", _AWQ_BITS), _number(content, "group_size")
    if str(content.get("version", "gemm")).lower() != "gemm":
        raise CheckpointError(f"quantization_config.version: {content['version']} isn't known here", "known is gemm")
    return Uniform(
        Words("awq", bits, group, not content.get("zero_point", True)), content.get("modules_to_not_convert")
    )


def read_gptq(content: Mapping[str, Any]) -> Uniform:
    """``quant_method: gptq``."""
    bits, group = _number(content, "bits", _GPTQ_BITS), _number(content, "group_size")
    dynamic = content.get("dynamic") or {}
    if any(not key.startswith("-:") for key in dynamic):
        raise CheckpointError("quantization_config.dynamic gives some modules other grids, which isn't known here")
    kept = content.get("modules_to_not_convert")
    layout = Words("gptq", bits, group, bool(content.get("sym", True)))
    return Uniform(layout, kept, [key.removeprefix("-:") for key in dynamic])


def read_fp8(content: Mapping[str, Any]) -> Uniform:
    """``quant_method: fp8``."""
    block = content.get("weight_block_size")
    static = content.get("activation_scheme") == "static"
    return Uniform(Fp8(None if block is None else (block[0], block[1]), static), content.get("modules_to_not_convert"))


def _number(content: Mapping[str, Any], key: str, allowed: tuple[int, ...] = ()) -> int:
    value = content.get(key)
    if not isinstance(value, int) or value == 0 or (allowed and value not in allowed):
        wanted = f"one of {', '.join(map(str, allowed))}" if allowed else "a number"
        raise CheckpointError(f"quantization_config.{key} is {value!r}", f"it ought to be {wanted}")
    return value
