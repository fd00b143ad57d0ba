"""The three quantized forms that LightLLM serves: AWQ's layout, FP8 in blocks, and int8 that it finds on loading.

LightLLM reads ``quant_method`` ``awq`` and ``fp8`` (its ``common/quantization/__init__.py``). It has no file format for
W8A8 in integers: ``--quant_type vllm-w8a8`` rounds the weights of a plain checkpoint as they're loaded, by
``scale = max|w| / 127`` for each row, in float32. Dequantized weights go through that unchanged if the largest code of
each row is 127 or -127, and if they are stored in float32. In bfloat16 both the product and the row's largest value are
off by up to 1/256, so that large codes come back as their neighbours; in float16 codes come back, but another scale
does. That is checked of every weight, by the same rule, before it's written. Tensor parallelism would cut rows of some
Linears into pieces first, each with a largest value of its own: one GPU it must be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from torch import Tensor

from ..errors import ExportError
from ..quant import ActSpec, PerBlock, PerChannel, PerGroup, PerToken, QuantSpec, QWeight, Scheme, UnitRecord
from .autoawq import awq_config, decompressed
from .base import Exporter, Layer
from .ct_layouts import Layout
from .word_layouts import AwqGemm, needed, read_by, stored_by
from .word_rules import (
    WordRules,
    check_no_cache,
    check_none_ignored,
    check_something_quantized,
    check_words,
)

Route = Literal["awq", "fp8", "w8a8"]

_BLOCK = 128
_LARGEST = 127
_BLOCKS, _GROUPS = QuantSpec.floating("e4m3", PerBlock(_BLOCK)), ActSpec(QuantSpec.floating("e4m3", PerGroup(_BLOCK)))
_CHANNELS, _TOKENS = QuantSpec(8, True, PerChannel()), ActSpec(QuantSpec(8, True, PerToken()))
_WORDS = WordRules("save_lightllm", bits=(4,), zero_points=True, channels=False, ignores=False)
_NEAREST: dict[Route, str] = {
    "awq": "weight {bit: 4, granularity: per_group, group_size: 128} without act",
    "fp8": "weight {bit: e4m3, symmetric: True, granularity: per_block, block_size: 128} with "
    "act {bit: e4m3, symmetric: True, granularity: per_group, group_size: 128}",
    "w8a8": "weight {bit: 8, symmetric: True, granularity: per_channel} with "
    "act {bit: 8, symmetric: True, granularity: per_token}",
}


class Fp8Blocks:
    """DeepSeek's FP8: codes of e4m3, and the float32 numbers that they are multiplied by, one for a square block."""

    parts: ClassVar[tuple[str, ...]] = ("weight", "weight_scale_inv")

    def tensors(self, weight: QWeight) -> dict[str, Tensor]:
        """As they are."""
        return {"weight": weight.codes, "weight_scale_inv": weight.scale}

    def read(self, stored: Mapping[str, Tensor], spec: QuantSpec) -> QWeight:
        """As they are."""
        return QWeight(stored["weight"], stored["weight_scale_inv"], None, spec)

    def nbytes(self, rows: int, columns: int, spec: QuantSpec) -> int:
        """Codes and scales."""
        return rows * columns + 4 * prod(spec.scale_shape(rows, columns))


_LAYOUTS: dict[Route, Layout] = {"awq": AwqGemm(), "fp8": Fp8Blocks()}
_MARKS: dict[Route, str] = {"awq": "qweight", "fp8": "weight_scale_inv"}


class LightLLM(Exporter):
    """Integers of 4 bits in groups; FP8 in blocks; W8A8 in integers as a plain checkpoint."""

    name = "save_lightllm"
    folder = "lightllm_quant_model"
    stores_group_index = False
    scale_dtype = torch.float16  # of packed integers; the other routes have float32

    def check(self, layers: list[Layer]) -> list[str]:
        """One of three schemes, for every Linear of every block."""
        check_something_quantized(self.name, self.schemes)
        check_no_cache(self.name, self.kv)
        route = route_of(self.schemes[0])
        if route == "awq":
            check_words(_WORDS, self.schemes, self.kv, layers)
        check_none_ignored(self.name, layers)
        if route == "fp8":
            _check_blocks(layers)
        if route != "w8a8":
            return []
        return [
            f"{self.name} holds float32 weights, which LightLLM rounds to the very same codes on loading, on one GPU "
            f"(--quant_type vllm-w8a8 --tp 1). That needs a code of {_LARGEST} in every row: rounding to nearest (RTN) "
            "gives it; methods that clip or correct weights, such as GPTQ, may not: then the run stops at that Linear"
        ]

    def nbytes(self, layer: Layer) -> int:
        """As the route stores it."""
        if layer.spec is None:
            return layer.rows * layer.columns * self.stored.itemsize
        layout = _LAYOUTS.get(route_of(layer.scheme))
        if layout is None:
            return layer.rows * layer.columns * torch.float32.itemsize
        return layout.nbytes(layer.rows, layer.columns, layer.spec)

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """Codes and scales, or the weights from which LightLLM finds them.

        Raises:
            ExportError: LightLLM would find other codes.
        """
        route = self._route
        if route in _LAYOUTS:
            return stored_by(_LAYOUTS[route], unit)
        return unit.plain | {f"{name}.weight": recoverable(name, weight) for name, weight in unit.quantized.items()}

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        """Codes and scales; of W8A8 the values."""
        route = self._route
        if route not in _LAYOUTS:
            return UnitRecord(plain=tensors)
        return read_by(_LAYOUTS[route], tensors, needed(self.spec), _MARKS[route])

    def independent(self, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
        """compressed-tensors' readers of such checkpoints. W8A8 has been through LightLLM's own rule."""
        route = self._route
        if route == "awq":
            return decompressed(tensors, name, needed(self.spec))
        if f"{name}.weight_scale_inv" not in tensors:
            return None
        own = {f"{name}.{part}": tensors[f"{name}.{part}"] for part in Fp8Blocks.parts}
        dense: Tensor = FP8BlockDequantizer(dtype=torch.float32).process(own)[f"{name}.weight"]
        return dense

    def config(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """The original's with a ``quantization_config``; of W8A8 without one."""
        if self._route == "awq":
            return awq_config(original, layers, needed(self.spec))
        plain = {key: value for key, value in original.items() if key != "quantization_config"}
        if self._route == "w8a8":
            return plain
        fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        return {**plain, "quantization_config": {**fp8, "weight_block_size": [_BLOCK, _BLOCK]}}

    def serve(self, folder: Path) -> str:
        """LightLLM's server."""
        options = {"awq": " --data_type fp16", "fp8": "", "w8a8": " --quant_type vllm-w8a8 --tp 1"}
        return f"python -m lightllm.server.api_server --model_dir {folder}{options[self._route]}"

    @property
    def _route(self) -> Route:
        return route_of(Scheme(self.spec, self.act))


def route_of(scheme: Scheme) -> Route:
    """How LightLLM runs a scheme.

    Raises:
        ExportError: not at all; the remedy names the nearest that it runs.
    """
    spec, act = scheme.weight, scheme.act
    if spec is None:
        raise ValueError("a Linear that isn't quantized takes no route")
    if spec.grid == "int" and act is None:
        return "awq"
    if spec.grid != "int":
        if spec != replace(_BLOCKS, ranges=spec.ranges) or act != _GROUPS:
            raise _unknown(scheme, "fp8")
        return "fp8"
    if spec != _CHANNELS or act != _TOKENS:
        raise _unknown(scheme, "w8a8" if spec.bits > 4 else "awq")
    return "w8a8"


def recovered(weight: Tensor) -> Tensor:
    """Codes int8 ``[out, in]`` that ``--quant_type vllm-w8a8`` finds in a weight ``[out, in]`` of any float dtype.

    The rule of ``lightllm/common/quantization/w8a8.py``: a row's largest magnitude over 127, in float32. In a row of
    zeros it divides by 0; whatever the codes, their scale 0 makes zeros of them.
    """
    scale = weight.float().abs().amax(-1, keepdim=True) / _LARGEST
    codes = (weight.float() / scale).nan_to_num(0.0).clamp(-_LARGEST, _LARGEST).round()
    return codes.to(torch.int8)


def recoverable(name: str, weight: QWeight) -> Tensor:
    """A weight ``[out, in]`` in float32, from which LightLLM recovers codes and scales.

    Raises:
        ExportError: it would find others; names the Linear and a row.
    """
    dense = weight.dequantize()
    same = (recovered(dense) == weight.codes).all(-1)  # then the scale is, too, but for its last place on a GPU
    if not same.all():
        row = int((~same).nonzero()[0])
        raise ExportError(
            f"{name}: LightLLM, which rounds weights anew on loading, would find other codes in {int((~same).sum())} "
            f"of {len(same)} rows: the largest code of row {row} is {int(weight.codes[row].int().abs().max())}, not "
            f"{_LARGEST} (save_lightllm)",
            "let RTN round: it always has that code (behind SmoothQuant or Awq without weight_clip, if you like); or "
            "write save_vllm, which stores codes",
        )
    return dense


def _unknown(scheme: Scheme, nearest: Route) -> ExportError:
    others = "; ".join(text for route, text in _NEAREST.items() if route != nearest)
    rule = {"w8a8": "; its scales are max|w| / 127 in float32", "fp8": "; its scales are float32"}.get(nearest, "")
    return ExportError(
        f"LightLLM can't run {scheme.describe()} as it was evaluated (save_lightllm){rule}",
        f"the nearest that it runs: {_NEAREST[nearest]} (others: {others}), without sym_mode, scale_dtype and "
        "calib_algo: mse; or write save_vllm or save_fake",
    )


def _check_blocks(layers: list[Layer]) -> None:
    for layer in layers:
        if layer.rows % _BLOCK or layer.columns % _BLOCK:
            raise ExportError(
                f"{layer.name}: blocks of {_BLOCK} don't divide {layer.rows} x {layer.columns}, and LightLLM leaves "
                "what is over without a scale (save_lightllm)",
                f"use {_NEAREST['w8a8']}; or write save_vllm",
            )
