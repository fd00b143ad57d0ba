"""Finished runs on a tiny model, and a browser where there is one."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Tiny runs, which other tests make too.
sys.path.append(str(Path(__file__).parents[1] / "e2e"))

from cases import make_case, write_texts, write_tokenizer
from chromium import BROWSER
from invented import add_analysis

collect_ignore = [] if BROWSER else ["test_report_in_browser.py"]

GPTQ_SYMMETRIC = {"weight": {"bit": 3, "symmetric": True, "granularity": "per_group", "group_size": 32}}


def pytest_report_header() -> list[str]:
    return [] if BROWSER else ["NOT TESTED, for it isn't installed: a browser for reports (chromium, or LLMC_CHROMIUM)"]


@dataclass(frozen=True)
class Made:
    """A finished run: its folder, and what ``metrics.json`` holds."""

    folder: Path
    metrics: dict[str, Any]


@pytest.fixture(scope="session")
def made(checkpoint: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """``plain``: 4 bits, no statistics. ``rtn``: the same with invented ones. ``gptq``: 3 bits, with its own."""
    root = tmp_path_factory.mktemp("runs")
    source = shutil.copytree(checkpoint("llama").folder, root / "tiny-llama")
    write_tokenizer(source)
    texts = write_texts(root)
    plain = make_case(source, texts, root / "plain", report={"analysis": False}).compress().metrics
    make_case(source, texts, root / "gptq", "GPTQ", quant=GPTQ_SYMMETRIC).compress()
    shutil.copytree(root / "plain", root / "rtn")
    return {
        "plain": Made(root / "plain", plain),
        "rtn": Made(root / "rtn", add_analysis(root / "rtn", seed=1)),
        "gptq": Made(root / "gptq", json.loads((root / "gptq" / "metrics.json").read_text())),
    }
