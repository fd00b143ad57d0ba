"""Tiny mixtures of experts of every family."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

SHAPE = {"vocab_size": 208, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {**SHAPE, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED = {**ROUTED, "shared_expert_intermediate_size": 96}
LATENT = {
    **COMMON,
    **ROUTED,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
LINEAR = {f"linear_{name}": 16 for name in ("key_head_dim", "value_head_dim")}
LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 8}

CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": Qwen2MoeConfig(**COMMON, **SHARED, num_experts=4, mlp_only_layers=[0]),
    "qwen3-moe": Qwen3MoeConfig(**COMMON, **ROUTED, num_experts=4, head_dim=16),
    "qwen3-next": Qwen3NextConfig(
        **COMMON, **SHARED, **LINEAR, num_experts=4, head_dim=16, layer_types=["linear_attention", "full_attention"]
    ),
    "deepseek-v2": DeepseekV2Config(**LATENT, q_lora_rank=None, topk_method="greedy"),
    "deepseek-v3": DeepseekV3Config(**LATENT, q_lora_rank=32, n_group=2, topk_group=1),
}

FUSED: dict[str, PretrainedConfig] = {
    "gpt-oss": GptOssConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "llama4-moe": Llama4TextConfig(
        **COMMON,
        intermediate_size_mlp=128,
        head_dim=16,
        num_local_experts=4,
        moe_layers=[1],
        no_rope_layers=[1, 0],
        attention_chunk_size=8,
    ),
}
"""Those whose checkpoints hold the matrices of all experts in one tensor."""


def fused_experts(model: nn.Module) -> dict[str, Any]:
    """Transformers' modules that keep all experts' matrices in one parameter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "gate_up_proj")}


def expert_weights(fused: Any) -> dict[str, Tensor]:
    """The weights of each expert's Linears, by their names in ``LinearExperts``."""
    found = {}
    for index, (both, down) in enumerate(zip(fused.gate_up_proj, fused.down_proj, strict=True)):
        gate, up = both.chunk(2)
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            found[f"{index}.{name}.weight"] = weight
    return found


def linear_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of Transformers' model, the experts' matrices one by one."""
    state = dict(model.state_dict())
    for path, fused in fused_experts(model).items():
        for name in ("gate_up_proj", "down_proj"):
            del state[f"{path}.{name}"]
        state |= {f"{path}.{name}": weight for name, weight in expert_weights(fused).items()}
    return state
