"""Which adapter serves a model: a declared one, or what discovery finds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from .config.schema import ModelConfig
from .errors import ModelError
from .models import Discovery, ModelAdapter, Subset, declared, discover, find_adapter
from .stream.empty import empty_model


def adapter_of(model: ModelConfig, config: PretrainedConfig, folder: Path) -> tuple[ModelAdapter, list[str]]:
    """The adapter that the section ``model`` asks for, and what a run should say of it.

    Raises:
        ModelError: none serves, or this model can't be compressed block by block.
    """
    adapter = find_adapter(
        model.type, config.model_type, lambda: explore(config, trust_remote_code=model.trust_remote_code).adapter()
    )
    if declared(config.model_type) is not None:
        return adapter, []
    return adapter, [
        f"nobody declared the architecture '{config.model_type}': its blocks, and the Linears that share an input, "
        f"were found by discovery; python -m llmc inspect {folder} shows them"
    ]


def explore(config: PretrainedConfig, *, trust_remote_code: bool) -> Discovery:
    """What discovery finds of a model, whether or not somebody declared it.

    Raises:
        ModelError: there is no such model, or it has no blocks.
    """
    with torch.random.fork_rng(devices=[]):
        return discover(empty_model(config, torch.float64, trust_remote_code=trust_remote_code), config)


def check_linears(blocks: Iterable[nn.Module], subsets: Sequence[tuple[Subset, ...]]) -> None:
    """Refuse modules that do what a Linear does without being one.

    Raises:
        ModelError: names the first.
    """
    for block, own in zip(blocks, subsets, strict=True):
        for name in (name for subset in own for name in subset.linears):
            module: Any = dict(block.named_modules()).get(name)
            if module is not None and not isinstance(module, nn.Linear):
                raise ModelError(
                    f"{name} is a {type(module).__name__}, not a Linear", "this architecture can't be compressed"
                )
