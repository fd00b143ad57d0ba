"""Tiny mixtures of experts, and runs over them that several tests look at."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import CONFIGS
from tiny import Tiny, checkpoints

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from cases import Case, make_case, write_texts, write_tokenizer


@pytest.fixture(scope="session", autouse=True)
def quick_collections() -> None:
    """Libraries' objects are left out of the collections that a run makes behind every block."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """A tiny mixture by its family's name; written once. Copy it before you change it."""
    return checkpoints(CONFIGS, tmp_path_factory.mktemp)


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param


@pytest.fixture
def tiny(family: str, checkpoint: Callable[[str], Tiny]) -> Tiny:
    """Each tiny mixture in turn."""
    return checkpoint(family)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_texts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def source_of(checkpoint: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny mixture with a tokenizer by its name. Copy it before you change it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("source") / name
            shutil.copytree(checkpoint(name).folder, made[name])
            write_tokenizer(made[name])
        return made[name]

    return get


@pytest.fixture
def case(source_of: Callable[[str], Path], texts: dict[str, Path], tmp_path: Path) -> Callable[..., Case]:
    """Makes runs of a family, or of a checkpoint, as those of dense models are made."""
    count = iter(range(10**6))

    def make(family: str | Path, method: Any = "RTN", **changes: Any) -> Case:
        source = family if isinstance(family, Path) else source_of(family)
        return make_case(source, texts, tmp_path / f"out-{next(count)}", method, **changes)

    return make
