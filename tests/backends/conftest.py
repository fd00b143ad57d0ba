"""Tests in a real backend are collected where that backend is installed."""

from __future__ import annotations

from llamacpp_oracle import llamacpp_python

collect_ignore = [] if llamacpp_python() else ["test_llamacpp.py"]
