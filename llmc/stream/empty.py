"""A model of transformers without weights, from its configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.utils import logging as transformers_logging

from ..errors import CheckpointError, ModelError
from ..models.experts import linearize_experts
from ..models.linearize import linearize
from .configuration import check_config
from .memory import unheaped

_LARGE = 2**26  # elements


def load_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The model's configuration, without what it says of quantized weights: they are decoded before anybody sees them.

    Raises:
        CheckpointError: ``config.json`` isn't understood, says that the weights are quantized in a way that can't be
            decoded, or asks for remote code without consent.
        ModelError: the model isn't a decoder.
    """
    check_config(folder, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as problem:
        brings_code = "trust_remote_code" in str(problem)
        remedy = "set model.trust_remote_code: True if you trust the code in it" if brings_code else "check model.path"
        raise CheckpointError(f"{folder}/config.json can't be used: {problem}", remedy) from problem
    if not isinstance(config, PretrainedConfig):
        raise CheckpointError(f"{folder}/config.json isn't a model's configuration", "check model.path")
    for of in (config, config.get_text_config()):
        of.__dict__.pop("quantization_config", None)
    return config


def auto_class(config: PretrainedConfig) -> Any:
    """Which of Transformers' automatic classes makes the whole model of a configuration: that for images and text where
    there is an encoder in it."""
    reads_images = hasattr(config, "vision_config") and type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM


def empty_model(
    config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False, images: bool = False
) -> Any:
    """A causal language model in eval mode, its parameters on the meta device, its buffers real; or one that reads
    ``images``. All that works like a Linear is one, experts among it.

    Raises:
        ModelError: Transformers has no causal language model for the configuration, or its code fails to make it.
    """
    logging: Any = transformers_logging  # parts of it have no annotations
    logging.disable_progress_bar()
    auto: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM  # from_config has no annotations
    if config.is_encoder_decoder:
        raise ModelError(
            f"'{config.model_type}' is an encoder-decoder, and llmc compresses decoder-only language models",
            "give a causal language model",
        )
    try:
        with without_memory():
            model: Any = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as problem:  # configurations and models of any family, each with errors of its own
        raise ModelError(
            f"Transformers can't make a causal language model of this config.json: {_first_line(problem)}",
            "is it one? a model with code of its own needs model.trust_remote_code: True",
        ) from problem
    linearize(model)
    linearize_experts(model)
    return model.eval()


@contextmanager
def without_memory() -> Iterator[None]:
    """Within the context models are made with their parameters on the meta device."""
    # Each parameter is made before it's taken away again: as many holes in the heap as the model is large.
    with unheaped(), init_empty_weights(include_buffers=False), _LargeOnMeta():
        yield


class _LargeOnMeta(TorchFunctionMode):
    """Makes large tensors without memory. Of what a model's constructor makes, only parameters are so large and come
    from these functions: the matrices of all experts of a block may be larger than the memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func in (torch.empty, torch.zeros) and options.get("device") is None:
            shape = args[0] if args and isinstance(args[0], list | tuple) else args
            if shape and math.prod(shape) > _LARGE:
                options["device"] = "meta"
        return func(*args, **options)


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0] or type(problem).__name__
