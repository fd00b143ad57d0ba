"""InternLM2, with the code that its checkpoints bring along: Llama's block, fused queries, keys and values."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import ModelAdapter, Residual, Subset, heads_of
from .parts import fused_attention, grouped_values


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """``w1`` is the gate, ``w3`` the other half."""
    gate_up = ("feed_forward.w1", "feed_forward.w3")
    down = "feed_forward.w2"
    return (
        *fused_attention("attention_norm", "attention.wqkv", "attention.wo", grouped_values(heads_of(config))),
        Subset(gate_up, "ffn_norm", "feed_forward", writes="ffn"),
        Subset((down,), "feed_forward.w3", down, reads="ffn", writes="residual"),
    )


def residual(config: PretrainedConfig) -> Residual:
    """Llama's, by other names."""
    return Residual(("model.tok_embeddings",), "model.norm", ("output",))


INTERNLM2 = ModelAdapter(
    "InternLM2", ("internlm2",), "model.layers", ("model.norm", "output"), subsets, residual=residual
)
