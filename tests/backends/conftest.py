"""Tests in a real backend are collected where that backend is installed; they share what other tests have."""

from __future__ import annotations

import sys
from pathlib import Path

from llamacpp_oracle import llamacpp_python

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("e2e", "export")]
collect_ignore = [] if llamacpp_python() else ["test_llamacpp.py"]
