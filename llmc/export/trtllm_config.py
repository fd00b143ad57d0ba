"""The two descriptions of a checkpoint in ModelOpt's unified layout: ``hf_quant_config.json`` and ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .modelopt_layouts import FP8, FP8_ROWS, NVFP4, W4A8, W4A16, W8A16, Algorithm

HF_QUANT_CONFIG = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"

_PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # whose layout it is; loaders look for the name
_EXCLUDED = ("lm_head", "*embed_tokens", "*mlp.gate", "*block_sparse_moe.gate", "*shared_expert_gate")
_FLOAT8: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
_FLOAT4: dict[str, Any] = {"dynamic": False, "num_bits": 4, "type": "float"}
_INT: dict[str, Any] = {"dynamic": False, "type": "int"}
_GROUPS: dict[Algorithm, dict[str, Any]] = {
    FP8: {"input_activations": _FLOAT8, "weights": _FLOAT8},
    FP8_ROWS: {"input_activations": _FLOAT8, "weights": {**_FLOAT8, "strategy": "channel"}},
    NVFP4: {"input_activations": {**_FLOAT4, "group_size": 16}, "weights": {**_FLOAT4, "group_size": 16}},
    W4A16: {"weights": {**_INT, "num_bits": 4, "group_size": 128}},
    W4A8: {"input_activations": {**_FLOAT8, "group_size": 128}, "weights": {**_FLOAT4, "group_size": 128}},
    W8A16: {"weights": {**_INT, "num_bits": 8}},
}


def hf_quant_config(algorithms: Mapping[str, Algorithm], ignored: list[str], *, cache: bool) -> dict[str, Any]:
    """``hf_quant_config.json``: one algorithm for all Linears, or each one's by its name.

    Args:
        algorithms: of the quantized Linears.
        ignored: the others.
        cache: whether the KV cache is FP8.
    """
    found = dict.fromkeys(algorithms.values())
    settings: dict[str, Any] = {"quant_algo": None}
    if len(found) == 1:
        settings = next(iter(found)).settings
    elif found:
        by_name = {name: algorithm.settings for name, algorithm in algorithms.items()}
        settings = {"quant_algo": MIXED, "quantized_layers": by_name}
    further = {"kv_cache_quant_algo": "FP8" if cache else None, "exclude_modules": [*_EXCLUDED, *ignored]}
    return {"producer": _PRODUCER, "quantization": {**settings, **further}}


def quantization_config(algorithms: Mapping[str, Algorithm], ignored: list[str], *, cache: bool) -> dict[str, Any]:
    """The same as ``config.json`` has it, for readers other than TensorRT-LLM."""
    stored = hf_quant_config(algorithms, ignored, cache=cache)["quantization"]
    found = {"quant_method": "modelopt", "producer": _PRODUCER, "ignore": stored["exclude_modules"]}
    found |= {key: stored[key] for key in ("quant_algo", "quantized_layers") if stored.get(key) is not None}
    groups: dict[Algorithm, list[str]] = {}
    for name, algorithm in algorithms.items():
        groups.setdefault(algorithm, []).append(name)
    if len(groups) == 1:
        groups = {algorithm: ["Linear"] for algorithm in groups if algorithm in (FP8, NVFP4)}
    if groups:
        found["config_groups"] = {
            f"group_{index}": {**_GROUPS[algorithm], "targets": sorted(names)}
            for index, (algorithm, names) in enumerate(groups.items())
        }
    return found | ({"kv_cache_scheme": _FLOAT8} if cache else {})
