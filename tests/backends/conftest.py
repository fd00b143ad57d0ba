"""Tests in a real backend are collected where that backend is installed; ``scripts/test.sh`` installs both."""

from __future__ import annotations

import sys
from pathlib import Path

from llamacpp_oracle import llamacpp_python
from vllm_oracle import VllmNotFound, vllm_python

# Tiny models and their configurations, which other tests have.
sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("e2e", "export")]


def has_vllm() -> bool:
    try:
        return vllm_python().is_file()
    except VllmNotFound:
        return False


MISSING = {
    "test_real_llamacpp.py": None if llamacpp_python() else "llama.cpp (LLMC_LLAMACPP_PYTHON)",
    "test_real_vllm.py": None if has_vllm() else "vLLM (LLMC_VLLM_PYTHON)",
}
collect_ignore = [file for file, backend in MISSING.items() if backend]


def pytest_report_header() -> list[str]:
    return [f"NOT TESTED, for it isn't installed: {backend}" for backend in MISSING.values() if backend]
