"""Whole runs on tiny checkpoints with a tokenizer: a configuration that every test varies by overrides."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import Case, make_case, write_pieces, write_texts, write_tokenizer


@pytest.fixture(scope="session", autouse=True)
def quick_collections() -> None:
    """Libraries' objects are left out of the collections that a run makes behind every block."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A text to calibrate on and one to evaluate on."""
    return write_texts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def source_of(checkpoint: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint with a tokenizer by its name. Copy it before you change it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("source") / name
            shutil.copytree(checkpoint(name).folder, made[name])
            write_tokenizer(made[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def pieced(source_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint by its name, with a tokenizer that llama.cpp knows beside the other."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = shutil.copytree(source_of(name), tmp_path_factory.mktemp("pieced") / name)
            write_pieces(made[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def exact(checkpoint: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint by its name, stored in float32: rotating costs no precision that would show."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("exact") / name
            checkpoint(name).model().save_pretrained(made[name], max_shard_size="80KB")
            write_tokenizer(made[name])
        return made[name]

    return get


@pytest.fixture
def source(source_of: Callable[[str], Path]) -> Path:
    """Grouped-query Llama, untied."""
    return source_of("llama")


@pytest.fixture
def damaged(source: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for the test to damage."""
    return shutil.copytree(source, tmp_path / "damaged")


@pytest.fixture
def case(source: Path, texts: dict[str, Path], tmp_path: Path) -> Callable[..., Case]:
    """Makes runs: RTN, 4 bits, asymmetric, groups of 32, into vLLM's and the fake-quantized folder."""
    count = iter(range(10**6))

    def make(checkpoint: Path = source, method: Any = "RTN", **changes: Any) -> Case:
        save_path = tmp_path / f"out-{next(count)}"
        return make_case(checkpoint, texts, save_path, method, **changes)

    return make
