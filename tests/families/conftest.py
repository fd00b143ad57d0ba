"""Tiny checkpoints of every family."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# Texts, tokenizers, runs, exact arithmetic and mixtures, which other tests have.
sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("e2e", "models", "mixtures")]

import pytest  # noqa: E402
import torch  # noqa: E402
from cases import write_tokenizer  # noqa: E402
from family_configs import CONFIGS, REMOTE  # noqa: E402
from tiny import Tiny, write_checkpoint, write_model  # noqa: E402
from transformers import dynamic_module_utils  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where Transformers keeps copies of code that comes with checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="session")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """A tiny checkpoint with a tokenizer by its name in ``CONFIGS`` and its dtype; written once."""

    @cache
    def get(name: str, dtype: torch.dtype = torch.bfloat16) -> Tiny:
        folder, config = tmp_path_factory.mktemp(name), CONFIGS[name]
        kind = REMOTE.get(type(config))
        if kind is None:
            write_checkpoint(config, folder, dtype)
        else:
            type(config).register_for_auto_class()
            kind.register_for_auto_class("AutoModelForCausalLM")
            torch.manual_seed(0)
            write_model(kind(config), folder, dtype)
        write_tokenizer(folder)
        return Tiny(name, folder, remote=kind is not None)

    return get


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest, family_of: Callable[..., Tiny]) -> Tiny:
    """Each tiny checkpoint in turn."""
    return family_of(request.param)
