"""OPT: LayerNorm, biases, ReLU, learned positions."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import ModelAdapter, Residual, Subset
from .parts import unrotatable


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """ReLU commutes with a positive scale, so fc1 can absorb fc2's. OPT-350M normalizes *after* each branch: there the
    norms don't feed q, k, v and fc1, and nothing can absorb their scale."""
    before = bool(getattr(config, "do_layer_norm_before", True))
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return (
        Subset(qkv, "self_attn_layer_norm" if before else None, "self_attn", writes="heads", orderable=True),
        Subset(("self_attn.out_proj",), "self_attn.v_proj", "self_attn.out_proj", reads="heads", writes="residual"),
        Subset(("fc1",), "final_layer_norm" if before else None, "fc1", writes="ffn"),
        Subset(("fc2",), "fc1", "fc2", reads="ffn", writes="residual"),
    )


def residual(config: PretrainedConfig) -> Residual:
    """Token and position embeddings enter it, the head reads it through the last norm.

    Raises:
        ModelError: a norm stands behind each addition, the last norm is missing, or the embedding is narrower than it.
    """
    if not getattr(config, "do_layer_norm_before", True):
        reason = "its norms stand behind each addition, so that their weights scale the residual channel by channel"
    elif getattr(config, "_remove_final_layer_norm", False):
        reason = "it has no norm behind the last block (_remove_final_layer_norm)"
    elif getattr(config, "word_embed_proj_dim", None) not in (None, config.hidden_size):
        reason = "projections stand between the embedding and the residual (word_embed_proj_dim)"
    else:
        before = ("model.decoder.embed_tokens", "model.decoder.embed_positions")
        return Residual(before, "model.decoder.final_layer_norm", ("lm_head",), keeps_mean=True)
    raise unrotatable("OPT", reason)


OPT = ModelAdapter(
    name="Opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    head=("model.decoder.final_layer_norm", "model.decoder.project_out", "lm_head"),
    subsets=subsets,
    aliases=("OPT",),
    residual=residual,
)
