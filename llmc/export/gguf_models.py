"""The architectures of llama.cpp as data: what a family's metadata are called, and what it does to tensors.

Rules are those of llama.cpp's converter (``conversion/``) and of its loader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ExportError

_EXPERT = re.compile(r"^(?P<path>.*)\.experts\.(?P<index>\d+)\.(?P<name>\w+)\.weight$")
_KEYS = ("rope_type", "type")
_PLAIN, _YARN = ("default", "linear", "llama3"), ("attention_factor", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class Field:
    """A number of the metadata: ``{architecture}.{key}``, from a key of ``config.json``."""

    key: str
    source: str
    kind: Literal["int", "float"] = "int"
    optional: bool = False


_COMMON = (
    Field("block_count", "num_hidden_layers"),
    Field("context_length", "max_position_embeddings"),
    Field("embedding_length", "hidden_size"),
    Field("feed_forward_length", "intermediate_size"),
    Field("attention.head_count", "num_attention_heads"),
    Field("attention.head_count_kv", "num_key_value_heads"),
    Field("attention.layer_norm_rms_epsilon", "rms_norm_eps", "float"),
    Field("vocab_size", "vocab_size"),
)
_EXPERTS = (Field("expert_used_count", "num_experts_per_tok"),)


@dataclass(frozen=True)
class Architecture:
    """A family.

    Attributes:
        name: ``general.architecture``.
        fields: numbers besides the common ones.
        turns_pairs: whether its rotary embedding turns neighbouring channels, so that the rows of queries and keys
            must change places.
        norm_shift: what is added to the weights of norms.
        routers: ends of the names of matrices that must be float32.
        fixed: values of the configuration that llama.cpp takes for granted.
        windowed: of so many blocks the last attends to everything, the others in a sliding window; 1: all have the
            window if there is one; 0: it knows no window.
        expert_names: the gguf package's names of stacked experts, by the checkpoint's.
    """

    name: str
    fields: tuple[Field, ...] = ()
    turns_pairs: bool = False
    norm_shift: float = 0.0
    routers: tuple[str, ...] = ()
    fixed: tuple[tuple[str, Any], ...] = (("hidden_act", "silu"),)
    windowed: int = 0
    expert_names: tuple[tuple[str, str], ...] = ()


_LLAMA_EXPERTS = tuple((name, f"layers.{{}}.feed_forward.experts.{name}") for name in ("w1", "w2", "w3"))
_QWEN_EXPERTS = tuple((name, f"model.layers.{{}}.mlp.experts.{name}") for name in ("gate_proj", "up_proj", "down_proj"))
_SILU, _GELU = ("hidden_act", "silu"), ("hidden_activation", "gelu_pytorch_tanh")
_WINDOW = Field("attention.sliding_window", "sliding_window", optional=True)
_QWEN_MOE = (
    *_EXPERTS,
    Field("expert_count", "num_experts"),
    Field("expert_count", "num_local_experts"),  # as newer configurations call them
    Field("expert_feed_forward_length", "moe_intermediate_size"),
)
_DENSE_NOWHERE: tuple[tuple[str, Any], ...] = (("mlp_only_layers", []), ("decoder_sparse_step", 1))

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", turns_pairs=True),
    "mistral": Architecture("llama", turns_pairs=True),
    "mixtral": Architecture(
        "llama",
        (*_EXPERTS, Field("expert_count", "num_local_experts")),
        turns_pairs=True,
        routers=("block_sparse_moe.gate.weight",),
        expert_names=_LLAMA_EXPERTS,
    ),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture(
        "qwen2moe",
        (*_QWEN_MOE, Field("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
        routers=("mlp.gate.weight", "mlp.shared_expert_gate.weight"),
        fixed=(_SILU, ("norm_topk_prob", False), *_DENSE_NOWHERE),
        expert_names=_QWEN_EXPERTS,
    ),
    "qwen3": Architecture("qwen3", fixed=(_SILU, ("attention_bias", False))),
    "qwen3_moe": Architecture(
        "qwen3moe",
        _QWEN_MOE,
        routers=("mlp.gate.weight",),
        fixed=(_SILU, ("attention_bias", False), ("norm_topk_prob", True), *_DENSE_NOWHERE),
        expert_names=_QWEN_EXPERTS,
    ),
    "gemma2": Architecture(
        "gemma2",
        (
            _WINDOW,
            Field("attn_logit_softcapping", "attn_logit_softcapping", "float"),
            Field("final_logit_softcapping", "final_logit_softcapping", "float"),
        ),
        norm_shift=1.0,
        fixed=(_GELU,),
        windowed=2,
    ),
    "gemma3_text": Architecture("gemma3", (_WINDOW,), norm_shift=1.0, fixed=(_GELU,), windowed=6),
    "phi3": Architecture("phi3", (_WINDOW,), windowed=1),
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a checkpoint, if llama.cpp computes it as Transformers does.

    Raises:
        ExportError: it has none, or another than this configuration asks for.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"save_llamacpp: the architecture '{kind}' can't be written for llama.cpp",
            f"known are {', '.join(ARCHITECTURES)}; write save_vllm or save_fake",
        )
    found = ARCHITECTURES[kind]
    for key, value in found.fixed:
        if key in config and config[key] != value and not (value == [] and not config[key]):
            raise ExportError(
                f"save_llamacpp: the model has {key} {config[key]!r}, llama.cpp's {found.name} computes with {value!r}",
                "write save_vllm or save_fake",
            )
    _check_attention(found, config)
    _check_rope(found, rope_of(config))
    fields_of(config)
    return found


def _check_attention(found: Architecture, config: Mapping[str, Any]) -> None:
    """llama.cpp scales by the head's width, and has one pattern of windows built in for each architecture."""
    scale, kinds = config.get("query_pre_attn_scalar"), config.get("layer_types") or ()
    if scale is not None and scale != head_dim(config):
        raise ExportError(
            f"save_llamacpp: the model has query_pre_attn_scalar {scale}, llama.cpp's {found.name} computes with "
            f"{head_dim(config)}",
            "write save_vllm or save_fake",
        )
    for index, kind in enumerate(kinds):
        everything = (index + 1) % found.windowed == 0 if found.windowed > 1 else kind == "full_attention"
        if found.windowed and everything != (kind == "full_attention"):
            raise ExportError(
                f"save_llamacpp: block {index} has {kind} (layer_types); in llama.cpp's {found.name} every "
                f"{found.windowed} blocks the last one attends to everything",
                "write save_vllm or save_fake",
            )


def limits_of(config: Mapping[str, Any]) -> list[str]:
    """Warnings: what llama.cpp computes alike only under a condition."""
    found, window = ARCHITECTURES[str(config["model_type"])], config.get("sliding_window")
    used = config.get("use_sliding_window", True) and window is not None
    if found.windowed or not used or window >= config["max_position_embeddings"]:
        return []
    return [
        f"save_llamacpp: llama.cpp's {found.name} attends to all tokens, the model to the last {window}: they compute "
        f"the same up to a context of {window} (llama-server -c {window})"
    ]


def fields_of(config: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of the metadata, by their keys behind the architecture's name.

    Raises:
        ExportError: one isn't given.
    """
    fields = (*_COMMON, *ARCHITECTURES[str(config["model_type"])].fields)
    numbers: dict[str, int | float] = {}
    for field in fields:
        value = config.get(field.source)
        if value is not None:
            numbers[field.key] = float(value) if field.kind == "float" else int(value)
    missing = [field for field in fields if not field.optional and field.key not in numbers]
    if missing:
        raise ExportError(f"save_llamacpp: config.json has no {missing[0].source}", "is it the model's own, unchanged?")
    dim = head_dim(config)
    numbers |= {"attention.key_length": dim, "attention.value_length": dim, "rope.dimension_count": dim}
    return numbers


def head_dim(config: Mapping[str, Any]) -> int:
    """Channels of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


# --- rotary embedding ------------------------------------------------------------------------------------------------


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of the rotary embedding; of models with two, that of full attention."""
    parameters: Mapping[str, Any] = config.get("rope_parameters") or {}
    inner = parameters.get("full_attention")
    return inner if isinstance(inner, Mapping) else parameters


def rope_type(rope: Mapping[str, Any]) -> str:
    """Its kind, under either of its names."""
    return str(next((rope[key] for key in _KEYS if rope.get(key)), "default"))


def _check_rope(found: Architecture, rope: Mapping[str, Any]) -> None:
    kind = rope_type(rope)
    known = kind in _PLAIN or kind == "yarn"
    stretched = kind == "yarn" and any(rope.get(key) is not None for key in _YARN)
    partial = rope.get("partial_rotary_factor") not in (None, 1, 1.0)
    if not known or stretched or partial:
        what = f"{kind} with {', '.join(key for key in _YARN if rope.get(key) is not None)}" if stretched else kind
        what = f"{what} with partial_rotary_factor" if partial else what
        raise ExportError(
            f"save_llamacpp: llama.cpp's {found.name} has no rotary embedding '{what}' (rope_parameters)",
            f"known are {', '.join(_PLAIN)} and yarn; write save_vllm or save_fake",
        )


def rope_fields(config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """The metadata of the rotary embedding, by their keys behind the architecture's name."""
    rope = rope_of(config)
    found: dict[str, int | float | str] = {"rope.freq_base": float(rope.get("rope_theta", 10000.0))}
    local = (config.get("rope_parameters") or {}).get("sliding_attention")
    if isinstance(local, Mapping) and "rope_theta" in local:
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    kind = rope_type(rope)
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found["rope.scaling.original_context_length"] = int(original)
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                found[f"rope.scaling.yarn_{key}"] = float(rope[key])
    return found


def rope_divisors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What Llama 3.1's scaling divides each pair's frequency by, float32 ``[head_dim / 2]``, as the tensor of ggml.

    Long waves are stretched by ``factor``, short ones stay, those between are blended (Llama 3.1's ``apply_scaling``).
    """
    rope = rope_of(config)
    if rope_type(rope) != "llama3":
        return {}
    dim, base, factor = head_dim(config), float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    frequency = base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = float(rope["original_max_position_embeddings"]) * frequency / (2 * math.pi)  # within the trained context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - blend) / factor + blend)).float()}


# --- tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stacked:
    """A tensor's place: the gguf package's original name, and its index among experts that are stored as one."""

    name: str
    expert: int | None = None


def place_of(found: Architecture, name: str) -> Stacked:
    """Where a tensor goes."""
    match = _EXPERT.match(name)
    stacked = dict(found.expert_names).get(match["name"]) if match else None
    if match is None or stacked is None:
        return Stacked(name)
    block = next(part for part in match["path"].split(".") if part.isdigit())
    return Stacked(f"{stacked.format(block)}.weight", int(match["index"]))


def turned_rows(found: Architecture, name: str, config: Mapping[str, Any]) -> Tensor | None:
    """The order in which llama.cpp wants the rows of a query or key projection, int64 ``[out]``; None: as they are.

    Transformers turns channel ``i`` of a head with ``i + dim / 2``, llama.cpp's architecture ``llama`` with its
    neighbour.
    """
    if not found.turns_pairs:
        return None
    module = name.rsplit(".", 2)[-2]
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module)
    if heads is None:
        return None
    count, dim = int(config[heads]), head_dim(config)
    return torch.arange(count * dim).reshape(count, 2, dim // 2).transpose(1, 2).reshape(-1)


def needs_float32(found: Architecture, name: str, shape: tuple[int, ...]) -> bool:
    """Whether ggml's kernels want a tensor in float32: norms, biases, routers."""
    return len(shape) == 1 or name.endswith(found.routers)
