"""Opens a checkpoint with the decoders that its ``config.json`` and its headers ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ...models.layouts import layout_of
from ..configuration import quantization_of, read_config
from ..decoding import Checkpoint, DenseEntry, Stage
from ..headers import TensorEntry, read_headers
from .compressed_tensors import compressed_stage
from .fp8_block import fp8_stage
from .mxfp4 import mxfp4_stage
from .own_layout import layout_stage

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers, and decide how their tensors are decoded. No weight is read.

    Args:
        folder: holds ``config.json`` and safetensors.

    Raises:
        CheckpointError: a header is damaged, or the weights can't be decoded.
    """
    stored, config = read_headers(folder), read_config(folder)
    stages = []
    quantization = quantization_of(config)
    if quantization is not None:
        stages.append(_quantized(stored, quantization, _dense_dtype(config)))
    layout = layout_of(str(config.get("model_type")))
    if layout is not None:
        stages.append(layout_stage(Checkpoint(stored, stages).entries, layout))
    checkpoint = Checkpoint(stored, [stage for stage in stages if stage.decoded])
    _check_dense(folder, checkpoint.entries)
    return checkpoint


def _quantized(stored: Mapping[str, TensorEntry], quantization: Mapping[str, Any], dtype: torch.dtype) -> Stage:
    method = quantization["quant_method"]
    if method == "fp8":
        return fp8_stage(stored, quantization, dtype)
    if method == "mxfp4":
        return mxfp4_stage(stored, dtype)
    return compressed_stage(stored, quantization, dtype)


def _dense_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that ``config.json`` names, in which Transformers would dequantize, too; bfloat16 if none."""
    text = config.get("text_config") or {}
    names = (of.get(key) for of in (config, text) for key in ("dtype", "torch_dtype"))
    return next((_DTYPES[name] for name in names if name in _DTYPES), torch.bfloat16)


def _check_dense(folder: Path, entries: Mapping[str, DenseEntry]) -> None:
    """Refuse codes that would be taken for weights."""
    for name, entry in entries.items():
        coded = not entry.dtype.is_floating_point or entry.dtype.itemsize == 1
        if coded and name.endswith((".weight", ".weight_packed", ".qweight")):
            raise CheckpointError(
                f"{folder}: {name} is stored in {str(entry.dtype).removeprefix('torch.')}, and config.json doesn't say "
                "how it's quantized (quantization_config)",
                "fetch config.json again, or give the original, unquantized checkpoint as model.path",
            )
