"""From ``quantization_config`` to how each module is stored. A new ``quant_method`` is one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ..errors import CheckpointError
from .compressed import CompressedTensors
from .layouts import DENSE, Layout
from .modelopt import ModelOpt
from .words import read_awq, read_fp8, read_gptq


class Method(Protocol):
    """Which module is stored how."""

    def layout(self, name: str, kind: str, stored: Sequence[str]) -> Layout:
        """Of a module by its name and class; ``stored`` are the parts that there are."""
        ...

    def names(self) -> list[str]:
        """Modules that the section names exactly: they ought to exist."""
        ...

    def cache_parts(self) -> tuple[str, ...]:
        """Names of tensors beside each attention, of a KV cache with static scales."""
        ...


class Plain:
    """Nothing is quantized."""

    def layout(self, name: str, kind: str, stored: Sequence[str]) -> Layout:
        """As it is."""
        return DENSE

    def names(self) -> list[str]:
        """None."""
        return []

    def cache_parts(self) -> tuple[str, ...]:
        """None."""
        return ()


METHODS: dict[str, Callable[[Mapping[str, Any]], Method]] = {
    "compressed-tensors": CompressedTensors,
    "awq": read_awq,
    "gptq": read_gptq,
    "fp8": read_fp8,
    "modelopt": ModelOpt,
}
"""Readers by ``quant_method``."""


def read_method(config: Mapping[str, Any]) -> Method:
    """The method that ``config.json`` speaks of.

    Raises:
        CheckpointError: it isn't known here, or its section isn't understood.
    """
    content = config.get("quantization_config") or config.get("compression_config")
    if not content:
        return Plain()
    name = content.get("quant_method") if isinstance(content, Mapping) else None
    if name not in METHODS:
        raise CheckpointError(f"quant_method {name!r} isn't known here", f"known are {', '.join(METHODS)}")
    return METHODS[name](content)
