"""Rules that several backends share: Linears that are run as one, and the KV cache."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ..errors import ExportError
from ..quant import Fp8Grid, KvSpec
from .base import Layer, OwnLayout

_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


def check_fused(layers: Sequence[Layer], backend: str) -> None:
    """Refuse different schemes in Linears that a backend runs as one, and in the experts of a layer.

    Raises:
        ExportError: names two of them.
    """
    _check_experts(layers, backend)
    by_name = {layer.name: layer for layer in layers}
    for layer in layers:
        differing = [name for name in layer.fused if by_name[name].scheme != layer.scheme]
        if differing:
            raise ExportError(
                f"{backend} fuses {', '.join(layer.fused)}, but {layer.name} and {differing[0]} have different schemes",
                "quantize them alike, or ignore them together (quant.mix_bits, ignored_layers)",
            )


def expert_layer(name: str) -> str | None:
    """The module of all experts of a layer that a Linear, by its checkpoint name, is of; None if it's no expert's."""
    found = _EXPERT.match(name)
    return None if found is None else found[1]


def _check_experts(layers: Sequence[Layer], backend: str) -> None:
    """One kernel computes all experts of a layer."""
    first: dict[str, Layer] = {}
    for layer in layers:
        experts = expert_layer(layer.name)
        if experts is None:
            continue
        other = first.setdefault(experts, layer)
        if other.scheme != layer.scheme:
            raise ExportError(
                f"{backend} has one scheme for all experts of a layer: those of {other.name} and {layer.name} differ",
                "quantize them alike, or ignore them together (quant.mix_bits, ignored_layers)",
            )


def check_cache(kv: KvSpec | None, backend: str, key: str) -> None:
    """Refuse any quantized KV cache but FP8 with static scales per tensor.

    Raises:
        ExportError: names what would do.
    """
    if kv is None:
        return
    fp8 = isinstance(kv.grid, Fp8Grid) and kv.grid.dtype == torch.float8_e4m3fn
    if not (fp8 and kv.static and kv.grid.scale_dtype == torch.float32):
        raise ExportError(
            f"{backend} has no KV cache such as quant.kvcache asks for ({kv.describe()}; {key})",
            "use method: Naive, bit: e4m3, symmetric: True, granularity: per_tensor, static: True; "
            "or keep it for the evaluation and write save_fake",
        )


def check_turned(save: str, layout: OwnLayout | None, layers: Sequence[Layer]) -> None:
    """Refuse Linears that a format stores as a ``weight`` ``[out, in]``, where loaders transpose that.

    Args:
        save: its key in the section ``save``.
        layout: how the model's own checkpoints hold its Linears.
        layers: those stored so; what is packed has names of its own, which nobody transposes.

    Raises:
        ExportError: names one.
    """
    turned = [layer.name for layer in layers if layout is not None and layout.transposes(layer.name)]
    if turned:
        raise ExportError(
            f"{turned[0]}: loaders of this architecture transpose weights that aren't packed, and {save} stores them "
            "[out, in]",
            "quantize all Linears of the blocks, to packed integers without quant.act; or write save_fake",
        )
