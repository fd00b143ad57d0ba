"""Blocks that are built alike."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_PLACE = re.compile(r"(layer|block)_?(idx|id|index|number)|idx|index")
_PASSING = {"training"}
Fingerprint = tuple[Any, ...]


def fingerprint(block: nn.Module) -> Fingerprint:
    """Equal for two blocks with the same tree of modules, shapes of parameters and flags, such as a kind of attention.
    Only a block's number may differ."""
    return tuple((name, *_marks(part)) for name, part in block.named_modules())


def _marks(part: nn.Module) -> tuple[Any, ...]:
    weight = part._parameters.get("weight")
    if isinstance(part, nn.Linear) and weight is not None:
        return "Linear", *weight.shape, part._parameters.get("bias") is not None
    shapes = tuple((name, None if p is None else tuple(p.shape)) for name, p in sorted(part._parameters.items()))
    return type(part).__qualname__, shapes, _flags(part)


def _flags(part: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (name, value)
        for name, value in sorted(vars(part).items())
        if isinstance(value, (bool, int, float, str)) and not _PLACE.fullmatch(name) and name not in _PASSING
    )
