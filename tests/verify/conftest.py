"""Exports of a tiny Llama. A test that damages one takes a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import Export, export

from llmc.quant import ActSpec, PerChannel, PerGroup, PerTensor, QuantSpec, StaticMinMax

W4 = QuantSpec(4, False, PerGroup(32), scale_dtype=torch.bfloat16)
SCHEMES: dict[str, tuple[QuantSpec, ActSpec | None]] = {
    "w4": (W4, None),
    "w4-channel": (replace(W4, granularity=PerChannel()), None),
    "w8a8": (QuantSpec(8, True, PerChannel()), ActSpec(QuantSpec(8, False, PerTensor()), StaticMinMax())),
    "fp8": (QuantSpec.floating("e4m3", PerChannel()), None),
}


@pytest.fixture(scope="session")
def exported(checkpoint: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    """By the name of a scheme."""
    made: dict[str, Export] = {}

    def get(name: str) -> Export:
        if name not in made:
            made[name] = export(checkpoint("llama").folder, tmp_path_factory.mktemp(name), *SCHEMES[name])
        return made[name]

    return get


@pytest.fixture
def copied(exported: Callable[[str], Export], tmp_path: Path) -> Callable[[str], Export]:
    """The same, to be damaged."""

    def get(name: str) -> Export:
        whole = exported(name)
        return Export(shutil.copytree(whole.vllm, tmp_path / "vllm"), whole.fake, whole.original)

    return get
