"""Finds the adapter of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ModelError
from .adapter import ModelAdapter
from .bloom import BLOOM
from .deepseek import DEEPSEEK2, DEEPSEEK3
from .falcon import FALCON
from .gemma import GEMMA, GEMMA2, GEMMA3
from .glm import CHATGLM, GLM, GLM4
from .gpt2 import GPT2
from .gpt_neox import GPT_NEOX
from .gpt_oss import GPT_OSS
from .internlm import INTERNLM2
from .llama import LLAMA
from .llama4 import LLAMA4
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .olmo import OLMO2
from .opt import OPT
from .phi import PHI, PHI3
from .qwen import QWEN, QWEN2, QWEN3
from .qwen3_next import QWEN3_NEXT
from .qwen_moe import QWEN2_MOE, QWEN3_MOE
from .siblings import GRANITE, MINICPM, SMOLLM3
from .stablelm import STABLELM
from .starcoder import BIGCODE, STARCODER2
from .vision import VISION

ADAPTERS: tuple[ModelAdapter, ...] = (
    *(LLAMA, LLAMA4, MISTRAL, QWEN, QWEN2, QWEN3, SMOLLM3, GRANITE, MINICPM, INTERNLM2),
    *(GEMMA, GEMMA2, GEMMA3, PHI, PHI3, GLM, GLM4, CHATGLM, OLMO2, STABLELM),
    *(OPT, BLOOM, FALCON, GPT_NEOX, BIGCODE, STARCODER2, GPT2),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, QWEN3_NEXT, DEEPSEEK2, DEEPSEEK3, GPT_OSS),
    *VISION,
)

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
        raise ModelError(
            f"no adapter for the architecture '{model_type}'; known are {known_architectures()}",
            "an adapter is one short file: copy llmc/models/llama.py, name the blocks and the Linears that share an "
            "input, and add it to ADAPTERS in llmc/models/registry.py",
        )
    if requested == "auto" or requested in (serving.name, *serving.aliases):
        return serving
    raise ModelError(
        f"model.type is '{requested}', but the checkpoint is a '{model_type}' model",
        f"set model.type to '{serving.name}', or to 'auto'",
    )


def known_architectures() -> str:
    """Every ``model_type`` with an adapter, those that begin alike together: ``llama, llama4_text; opt``."""
    groups: dict[str, list[str]] = {}
    for model_type in sorted(name for adapter in ADAPTERS for name in adapter.model_types):
        stem = next((stem for stem in groups if model_type.startswith(stem)), model_type.rstrip("0123456789"))
        groups.setdefault(stem, []).append(model_type)
    return "; ".join(", ".join(names) for names in groups.values())
