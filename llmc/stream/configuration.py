"""What ``config.json`` says before Transformers reads it, and which models are refused for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from packaging.version import InvalidVersion, Version
from transformers import CONFIG_MAPPING

from ..errors import CheckpointError, ModelError

_READ = {"fp8": "FP8 with weight_scale_inv", "compressed-tensors": "compressed-tensors", "mxfp4": "gpt-oss's MXFP4"}
_NAMES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM's FP8",
    "fp_quant": "FP-Quant",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "NVIDIA's ModelOpt",
    "modelopt_fp4": "NVIDIA's ModelOpt",
    "quanto": "Quanto",
    "quark": "AMD's Quark",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as plain values.

    Raises:
        CheckpointError: it's missing or isn't an object.
    """
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise CheckpointError(f"{file} can't be used: {problem}", "check model.path") from problem
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} isn't a model's configuration", "check model.path")
    return content


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the weights are quantized, with its ``quant_method``, whose decoder there is; None if they aren't.

    Raises:
        CheckpointError: by a method that can't be an input.
    """
    inner = config.get("text_config")
    found = config.get("quantization_config") or (inner.get("quantization_config") if isinstance(inner, dict) else None)
    if not found:
        return None
    method = found.get("quant_method", "unknown method") if isinstance(found, dict) else "unknown method"
    if method in _READ:
        return dict(found)
    known = f"in {_NAMES[method]}'s format" if method in _NAMES else "by a method that llmc doesn't know"
    raise CheckpointError(
        f"the checkpoint is already quantized ({method}), {known}, which can't be an input; can be: "
        f"{', '.join(_READ.values())}",
        "give the original, unquantized checkpoint as model.path",
    )


def check_config(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse what can't be compressed for reasons that ``config.json`` alone tells.

    Raises:
        CheckpointError: another method's quantization, an architecture that needs a newer Transformers, or code of its
            own without consent.
        ModelError: an encoder-decoder.
    """
    config = read_config(folder)
    quantization_of(config)
    if not config.get("quantization_config") and (folder / "hf_quant_config.json").exists():
        quantization_of({"quantization_config": {"quant_method": "modelopt"}})
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{folder} is an encoder-decoder ({config.get('model_type')}), and llmc compresses decoder-only models",
            "give a decoder-only language model as model.path",
        )
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type not in CONFIG_MAPPING:
        _check_unknown(folder, model_type, config, trust_remote_code)


def _check_unknown(folder: Path, model_type: str, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """An architecture that isn't part of the installed Transformers."""
    installed, wrote = transformers.__version__, config.get("transformers_version")
    if config.get("auto_map"):
        if not trust_remote_code:
            raise CheckpointError(
                f"{folder}/config.json: the architecture '{model_type}' brings code of its own (auto_map), and "
                f"Transformers {installed} has none for it",
                "read that code, and if you trust it, set model.trust_remote_code: True: that is the consent to run it",
            )
        return
    newer = f"; Transformers {wrote} wrote the file" if _is_newer(wrote, installed) else ""
    raise CheckpointError(
        f"{folder}/config.json: Transformers {installed} doesn't know the architecture '{model_type}'{newer}",
        "an llmc for a newer Transformers may know it" if newer else "check model.path and model_type",
    )


def _is_newer(wrote: Any, installed: str) -> bool:
    try:
        return isinstance(wrote, str) and Version(wrote) > Version(installed)
    except InvalidVersion:
        return False
