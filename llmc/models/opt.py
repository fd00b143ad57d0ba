"""OPT: LayerNorm, biases, ReLU, learned positions."""

from __future__ import annotations

from transformers import PretrainedConfig

from .adapter import ModelAdapter, Subset


def subsets(config: PretrainedConfig) -> tuple[Subset, ...]:
    """ReLU commutes with a positive scale, so fc1 can absorb fc2's. OPT-350M normalizes *after* each branch: there the
    norms don't feed q, k, v and fc1, and nothing can absorb their scale."""
    before = bool(getattr(config, "do_layer_norm_before", True))
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return (
        Subset(qkv, "self_attn_layer_norm" if before else None, "self_attn"),
        Subset(("self_attn.out_proj",), "self_attn.v_proj", "self_attn.out_proj", reads="heads"),
        Subset(("fc1",), "final_layer_norm" if before else None, "fc1"),
        Subset(("fc2",), "fc1", "fc2", reads="ffn"),
    )


OPT = ModelAdapter(
    name="Opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    head=("model.decoder.final_layer_norm", "model.decoder.project_out", "lm_head"),
    subsets=subsets,
    aliases=("OPT",),
)
