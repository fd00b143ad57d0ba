"""What the loaders of AutoAWQ's and GPTQ's layouts take: one grid of packed integers for all quantized Linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import ExportError
from ..quant import KvSpec, PerChannel, PerGroup, QuantSpec, Scheme
from .base import Layer
from .shared import check_fused

_FAKE = "write save_fake, which Transformers loads"


@dataclass(frozen=True)
class WordRules:
    """The rules of one format.

    Attributes:
        save: its key in the section ``save``.
        bits: of codes.
        zero_points: whether asymmetric grids can be stored.
        groups: sizes of groups.
        channels: whether one scale a row can be stored.
        ignores: whether its loader leaves Linears alone that aren't quantized.
    """

    save: str
    bits: tuple[int, ...]
    zero_points: bool
    groups: tuple[int, ...] = (32, 64, 128)
    channels: bool = True
    ignores: bool = True


def check_words(rules: WordRules, schemes: Sequence[Scheme], kv: KvSpec | None, layers: Sequence[Layer]) -> list[str]:
    """Refuse what the format can't store, or its loaders don't load.

    Args:
        rules: of the format.
        schemes: of the run; one, or none if nothing is quantized.
        kv: how the KV cache is quantized.
        layers: of all blocks.

    Returns:
        Warnings: what only some of its loaders load.

    Raises:
        ExportError: names the key or the layer, and the nearest that would do.
    """
    check_something_quantized(rules.save, schemes)
    check_no_cache(rules.save, kv)
    for scheme in schemes:
        if scheme.act is not None:
            raise ExportError(
                f"{rules.save} stores weights alone, and quant.act asks for {scheme.act.describe()}",
                "leave out quant.act, or write save_vllm; save_fake evaluates and stores any scheme (weights only)",
            )
        if scheme.weight is not None:
            _check_grid(rules, scheme.weight)
    for layer in layers:
        if layer.spec is not None:
            _check_shape(rules, layer, layer.spec)
    if not rules.ignores:
        check_none_ignored(rules.save, layers)
    check_fused(layers, f"the backend of {rules.save}")
    return _of_ignored(rules.save, layers)


def check_something_quantized(save: str, schemes: Sequence[Scheme]) -> None:
    """Refuse a run that only prunes, or only quantizes the KV cache."""
    if not schemes:
        raise ExportError(
            f"{save} stores quantized weights, and this run quantizes none", "write save_fake, or add quant.weight"
        )


def check_no_cache(save: str, kv: KvSpec | None) -> None:
    """Refuse a KV cache that the backend wouldn't round as it was evaluated."""
    if kv is not None:
        raise ExportError(
            f"{save} can't say how the KV cache is quantized (quant.kvcache: {kv.describe()})",
            "remove quant.kvcache, or write save_vllm, which stores FP8 scales of it",
        )


def check_none_ignored(save: str, layers: Sequence[Layer]) -> None:
    """Refuse Linears that aren't quantized, where the backend takes all for quantized."""
    for layer in layers:
        if layer.spec is None:
            raise ExportError(
                f"{layer.name} isn't quantized, and the backend of {save} loads only models in which every Linear of "
                "a block is",
                "remove ignored_layers and mix_bits settings with do_quant: False, or write save_vllm",
            )


def _of_ignored(save: str, layers: Sequence[Layer]) -> list[str]:
    """SGLang looks for the names of ignored Linears in the name of the fused one, and doesn't find them there."""
    fused = [layer.name for layer in layers if layer.spec is None and len(layer.fused) > 1]
    if not fused:
        return []
    return [
        f"{save}: vLLM sees by itself that {fused[0]} isn't quantized, of Linears that it fuses; other loaders, such "
        "as SGLang, look for the fused name and take it for quantized"
    ]


def _check_grid(rules: WordRules, spec: QuantSpec) -> None:
    bits = " or ".join(map(str, rules.bits))
    if spec.grid != "int" or spec.bits not in rules.bits:
        raise ExportError(
            f"{rules.save} stores integers of {bits} bits, and quant.weight asks for {spec.describe()}",
            f"use bit: {rules.bits[0]}, or {_FAKE}",
        )
    if not spec.symmetric and not rules.zero_points:
        raise ExportError(
            f"{rules.save} stores symmetric grids: its loaders refuse zero points ({spec.describe()})",
            "use symmetric: True, or write save_autoawq, which has zero points of 4 bits",
        )
    sizes = ", ".join(map(str, rules.groups))
    grouped = isinstance(spec.granularity, PerGroup) and spec.granularity.size in rules.groups
    whole_rows = isinstance(spec.granularity, PerChannel) and rules.channels
    if not grouped and not whole_rows:
        raise ExportError(
            f"{rules.save} stores one scale for each group of {sizes} input channels"
            f"{' or for each row' if rules.channels else ''}, and quant.weight asks for {spec.describe()}",
            f"use granularity: per_group with group_size: {sizes}{', or per_channel' if rules.channels else ''}; "
            f"or {_FAKE}",
        )
    if spec.scale_dtype != torch.float16:
        raise ExportError(
            f"{rules.save} stores scales in float16, and rounding them again would change the evaluated weights",
            "set quant.weight.scale_dtype: float16, or leave it out",
        )


def _check_shape(rules: WordRules, layer: Layer, spec: QuantSpec) -> None:
    in_word = 32 // spec.bits
    if layer.rows % in_word or layer.columns % in_word:
        raise ExportError(
            f"{layer.name}: {layer.rows} x {layer.columns} codes of {spec.bits} bits don't fill words of {in_word} "
            f"({rules.save})",
            f"name it in ignored_layers{'' if rules.ignores else ' and write save_vllm'}, or {_FAKE}",
        )
