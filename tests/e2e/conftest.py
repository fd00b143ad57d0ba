"""Whole runs on tiny checkpoints with a tokenizer: a configuration that every test varies by overrides."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import Case, files_of, make_case, write_pieces, write_texts, write_tokenizer

from llmc.cli import main
from llmc.stream.source import BlockSource


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


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Runs a case that must be refused before a weight is read, and returns the message. Converted
    checkpoints are kept where the test ends."""
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))

    def run(case: Case, *overrides: str) -> str:
        capsys.readouterr()
        files = {folder: files_of(folder) for folder in (case.source, case.save_path) if folder.is_dir()}
        existed = case.save_path.exists()
        with monkeypatch.context() as patch:
            for name in ("prefetch", "take", "_read"):
                patch.setattr(BlockSource, name, lambda self, unit: pytest.fail(f"{unit} is read"))
            code = main([*case.arguments, *(part for text in overrides for part in ("--set", text))])
        message = capsys.readouterr().err
        assert code == 2, message
        assert message.count("error: ") == 1
        assert "\n  -> " in message  # the remedy
        assert "Traceback" not in message
        assert case.save_path.exists() == existed
        assert files == {folder: files_of(folder) for folder in files}
        return message

    return run
