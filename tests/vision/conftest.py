"""Tiny vision-language checkpoints, written once."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from tiny_vision import CONFIGS, TinyVision, write_checkpoint


@pytest.fixture(scope="session", autouse=True)
def quick_collections() -> None:
    """Libraries' objects are left out of the collections that a run makes behind every block."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyVision]:
    """A tiny checkpoint by its name in ``CONFIGS``. Copy it before you change it."""
    written: dict[str, TinyVision] = {}

    def get(name: str) -> TinyVision:
        if name not in written:
            folder = tmp_path_factory.mktemp(name)
            write_checkpoint(name, folder)
            written[name] = TinyVision(name, folder)
        return written[name]

    return get


@pytest.fixture(params=CONFIGS)
def tiny(request: pytest.FixtureRequest, vision: Callable[[str], TinyVision]) -> TinyVision:
    """Each tiny checkpoint in turn."""
    return vision(request.param)
