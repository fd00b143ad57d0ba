"""Finds the adapter of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ModelError
from .adapter import ModelAdapter
from .llama import LLAMA
from .mistral import MISTRAL
from .opt import OPT
from .qwen import QWEN2, QWEN3

ADAPTERS: tuple[ModelAdapter, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, OPT)


def declared(model_type: str) -> ModelAdapter | None:
    """The adapter that serves a ``model_type``; None if nobody declared one."""
    return next((adapter for adapter in ADAPTERS if model_type in adapter.model_types), None)


def find_adapter(requested: str, model_type: str, discovered: Callable[[], ModelAdapter] | None = None) -> ModelAdapter:
    """The adapter that ``model.type`` names, or, with ``auto``, the one that serves ``config.json``'s ``model_type``.

    Args:
        requested: ``model.type``.
        model_type: that of ``config.json``.
        discovered: makes an adapter, with ``auto``, where none serves.

    Raises:
        ModelError: no adapter serves the checkpoint, or the named one is for another architecture.
    """
    serving = declared(model_type)
    if serving is None and requested == "auto" and discovered is not None:
        return discovered()
    if serving is None:
        known = ", ".join(sorted(t for a in ADAPTERS for t in a.model_types))
        raise ModelError(
            f"no adapter for the architecture '{model_type}' (known: {known})",
            "an adapter is one short file: copy llmc/models/llama.py, name the blocks and the Linears that share an "
            "input, and add it to ADAPTERS in llmc/models/registry.py",
        )
    if requested == "auto" or requested in (serving.name, *serving.aliases):
        return serving
    raise ModelError(
        f"model.type is '{requested}', but the checkpoint is a '{model_type}' model",
        f"set model.type to '{serving.name}', or to 'auto'",
    )
