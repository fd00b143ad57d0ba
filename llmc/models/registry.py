"""Finds the adapter of a checkpoint."""

from __future__ import annotations

from ..errors import ModelError
from .adapter import ModelAdapter
from .deepseek import DEEPSEEK2, DEEPSEEK3
from .gpt2 import GPT2
from .gpt_oss import GPT_OSS
from .llama import LLAMA
from .llama4 import LLAMA4
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .opt import OPT
from .qwen import QWEN2, QWEN3
from .qwen3_next import QWEN3_NEXT
from .qwen_moe import QWEN2_MOE, QWEN3_MOE

ADAPTERS: tuple[ModelAdapter, ...] = (
    *(LLAMA, LLAMA4, MISTRAL, MIXTRAL, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, QWEN3_NEXT, OPT),
    *(DEEPSEEK2, DEEPSEEK3, GPT2, GPT_OSS),
)


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
