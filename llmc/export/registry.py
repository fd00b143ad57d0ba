"""The formats by their keys in a YAML file's ``save`` section."""

from __future__ import annotations

from .autoawq import MLCLLM, AutoAWQ
from .autogptq import AutoGPTQ
from .base import Exporter
from .dense import FakeQuant, Transformed
from .imatrix import Imatrix
from .lightllm import LightLLM
from .llamacpp import LlamaCpp
from .sglang import SGLang
from .trtllm import TRTLLM
from .vllm import VLLM

EXPORTERS: tuple[type[Exporter], ...] = (
    VLLM,
    SGLang,
    TRTLLM,
    AutoAWQ,
    AutoGPTQ,
    MLCLLM,
    LightLLM,
    LlamaCpp,
    FakeQuant,
    Transformed,
    Imatrix,
)
