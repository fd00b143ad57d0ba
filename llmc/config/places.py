"""Names of layers as ``quant.mix_bits`` writes them: ``down_proj``, ``down_proj#0-1-2``, ``experts.*.down_proj``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmc.config.suggest import show

_NAME = re.compile(r"[\w*.?]+")


@dataclass(frozen=True)
class LayerPlace:
    """Layers by a name inside their block, or the end of one, in some blocks or (``None``) in all."""

    name: str
    blocks: frozenset[int] | None = None


def layer_place(text: str) -> LayerPlace:
    """What a ``layer_name`` means.

    Behind ``#`` stand the numbers of blocks, joined by ``-`` as LLMC has it: ``#0-1-2`` and ``#0-3`` are lists, not
    ranges. ``..`` makes a range, both ends included: ``#0..3-31``.

    Raises:
        ValueError: it isn't of that form.
    """
    name, hash_sign, numbers = text.partition("#")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{show(text)} doesn't begin with a layer's name, such as down_proj or mlp.down_proj")
    if not hash_sign:
        return LayerPlace(name)
    return LayerPlace(name, frozenset(block for part in numbers.split("-") for block in _blocks(text, part)))


def _blocks(text: str, part: str) -> range:
    low, dots, high = part.partition("..")
    if not low.isdecimal() or (dots and not high.isdecimal()):
        raise ValueError(f"{show(text)}: behind # stand numbers of blocks, such as #0-1-2, or ranges, such as #0..2")
    if dots and int(high) < int(low):
        raise ValueError(f"{show(text)}: the range {part} runs backwards")
    return range(int(low), int(high or low) + 1)


def read_layers(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Check every ``layer_name`` of a setting."""
    for text in texts:
        layer_place(text)
    return texts
