"""Finds the adapter of a checkpoint."""

from __future__ import annotations

from ..errors import ModelError
from .adapter import ModelAdapter
from .llama import LLAMA
from .mistral import MISTRAL
from .opt import OPT
from .qwen import QWEN2, QWEN3
from .vision import VISION

ADAPTERS: tuple[ModelAdapter, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, OPT, *VISION)

_ELSEWHERE = {
    "internvl_chat": (
        "this is InternVL with remote code (model_type internvl_chat), whose modules Transformers doesn't know",
        "take its conversion for Transformers (a repository whose name ends in -hf: model_type internvl)",
    ),
    "llava_llama": (
        "this is LLaVA as its authors' code stores it (model_type llava_llama), which Transformers doesn't know",
        "take its conversion for Transformers, such as llava-hf/llava-1.5-7b-hf (model_type llava)",
    ),
}
"""Layouts that another checkpoint of the same model replaces."""


def refuse_foreign_layout(model_type: str) -> None:
    """Refuse a checkpoint that exists in a layout which can be used.

    Raises:
        ModelError: names that.
    """
    if model_type in _ELSEWHERE:
        raise ModelError(*_ELSEWHERE[model_type])


def find_adapter(requested: str, model_type: str) -> ModelAdapter:
    """The adapter that ``model.type`` names, or, with ``auto``, the one that serves ``config.json``'s ``model_type``.

    Raises:
        ModelError: no adapter serves the checkpoint, or the named one is for another architecture.
    """
    serving = next((a for a in ADAPTERS if model_type in a.model_types), None)
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
