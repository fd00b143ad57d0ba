"""Blocks that are built alike."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

_PLACE = re.compile(r"(layer|block)_?(idx|id|index|number)|idx|index")
_PASSING = {"training"}
Fingerprint = tuple[Any, ...]


def fingerprint(block: nn.Module) -> Fingerprint:
    """Equal for two blocks with the same tree of modules, shapes of parameters and flags, such as a kind of attention.
    Only a block's number may differ, and in which order the weight of a Linear is stored."""
    return tuple((name, *_marks(part)) for name, part in block.named_modules())


def _marks(part: nn.Module) -> tuple[Any, ...]:
    weight = part._parameters.get("weight")
    if isinstance(part, (nn.Linear, Conv1D)) and weight is not None:
        rows, columns = weight.shape if isinstance(part, nn.Linear) else weight.shape[::-1]
        return "Linear", rows, columns, part._parameters.get("bias") is not None
    shapes = tuple((name, None if p is None else tuple(p.shape)) for name, p in sorted(part._parameters.items()))
    return type(part).__qualname__, shapes, _flags(part)


def _flags(part: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (name, value)
        for name, value in sorted(vars(part).items())
        if isinstance(value, (bool, int, float, str)) and not _PLACE.fullmatch(name) and name not in _PASSING
    )


def transposed(block: nn.Module) -> tuple[str, ...]:
    """Names of the Linears whose weight is stored ``[in, out]`` (GPT-2's Conv1D)."""
    return tuple(name for name, part in block.named_modules() if isinstance(part, Conv1D))


def straighten(block: nn.Module) -> None:
    """Put Linears in their place, on the meta device, in a block without weights."""
    for name in transposed(block):
        weight = block.get_submodule(name)._parameters["weight"]
        assert weight is not None
        columns, rows = weight.shape
        block.set_submodule(name, nn.Linear(columns, rows, device="meta", dtype=weight.dtype))
