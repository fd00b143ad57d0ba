"""Checkpoint formats: each one file, a pure function of the core's records, with its inverse."""

from .base import Exporter, Layer, Source, copy_side_files, read_config, with_own_head, without_quantization
from .check import check_shard
from .registry import EXPORTERS
from .shared import expert_layer
from .trtllm_check import check_trtllm

__all__ = [
    "EXPORTERS",
    "Exporter",
    "Layer",
    "Source",
    "check_shard",
    "check_trtllm",
    "copy_side_files",
    "expert_layer",
    "read_config",
    "with_own_head",
    "without_quantization",
]
