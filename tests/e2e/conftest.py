"""Whole runs on tiny checkpoints with a tokenizer: a configuration that every test varies by overrides."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import WINDOW, WINDOWS, Case, words, write_pieces, write_tokenizer


@pytest.fixture(scope="session", autouse=True)
def quick_collections() -> None:
    """Libraries' objects are left out of the collections that a run makes behind every block."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A text to calibrate on and one to evaluate on."""
    folder = tmp_path_factory.mktemp("text")
    made = {"calib": folder / "calib.txt", "eval": folder / "eval.txt"}
    made["calib"].write_text(words(400, seed=1))
    made["eval"].write_text(words(WINDOW * WINDOWS + 5, seed=2))
    return made


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
        text = {"name": "text", "bs": 1}
        content: dict[str, Any] = {
            "base": {"seed": 42, "device": "cpu"},
            "model": {"path": str(checkpoint), "torch_dtype": "float32"},
            "calib": {
                **text,
                "path": str(texts["calib"]),
                "n_samples": 4,
                "seq_len": 16,
                "preproc": "sequential",
            },
            "eval": {
                **text,
                "path": str(texts["eval"]),
                "seq_len": WINDOW,
                "num_chunks": WINDOWS,
                "eval_pos": ["pretrain", "fake_quant"],
            },
            "quant": {
                "method": method,
                "weight": {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 32},
            },
            "save": {"save_vllm": True, "save_fake": True, "save_path": str(save_path)},
        }
        for section, values in changes.items():
            content[section] = {**content.get(section, {}), **values} if isinstance(values, dict) else values
        return Case(checkpoint, save_path, content)

    return make
