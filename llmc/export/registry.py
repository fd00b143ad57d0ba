"""The formats by their keys in a YAML file's ``save`` section."""

from __future__ import annotations

from .base import Exporter
from .dense import FakeQuant, Transformed
from .llamacpp import LlamaCpp
from .vllm import VLLM

EXPORTERS: tuple[type[Exporter], ...] = (VLLM, LlamaCpp, FakeQuant, Transformed)
