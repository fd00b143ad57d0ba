"""What tests of function-preserving changes share: tiny models of every family, exact throughout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from llmc.models import Subset, find_adapter
from llmc.models.linearize import linearize

TINY = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
ROTARY = {**TINY, "intermediate_size": 40, "max_position_embeddings": 64}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**ROTARY, num_key_value_heads=4),
    "llama-gqa": LlamaConfig(**ROTARY, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**ROTARY, num_key_value_heads=2, sliding_window=4),
    "qwen2": Qwen2Config(**ROTARY, num_key_value_heads=2),
    "qwen2-mha": Qwen2Config(**ROTARY, num_key_value_heads=4),
    "qwen3": Qwen3Config(**ROTARY, num_key_value_heads=2, head_dim=16),
    "opt": OPTConfig(**TINY, ffn_dim=40, max_position_embeddings=64, word_embed_proj_dim=32),
    "opt-post-norm": OPTConfig(
        **TINY, ffn_dim=40, max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_inner=40, n_positions=64),
}


def subsets_of(config: PretrainedConfig, block: int = 0) -> tuple[Subset, ...]:
    """What the adapter declares of a block."""
    adapter = find_adapter("auto", config.model_type)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    return adapter.subsets(config, model.get_submodule(adapter.blocks)[block])


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    """Random weights, biases and norms, no signs preferred, in float64 throughout: Transformers' RMSNorm goes through
    float32, where an error below 1e-7 would hide."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa").eval()
    linearize(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            exact = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=torch.float64)
            model.set_submodule(name, exact)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def change(before: Tensor, after: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((after - before).abs().max() / before.abs().max()).item()
