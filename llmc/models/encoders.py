"""The blocks of the image encoders of each family: which Linears share an input, and what can absorb a scale of it.

All of them are plain transformers, a norm in front of each part. Most have GELU between the feed-forward's Linears,
which lets no scale pass.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from ..errors import ModelError
from .adapter import Encoder, Heads, Subset
from .parts import attention, fused_attention, gated, plain, stacked_values

_TOWERS = ("clip_vision_model", "siglip_vision_model")
_QWEN = "model.visual.blocks"


def _heads(count: int, width: int) -> Heads:
    """Every query head has keys and values of its own."""
    return Heads(query=count, kv=count, dim=width // count)


def tower(config: PretrainedConfig) -> Encoder:
    """CLIP or SigLIP, as ``config.json`` says.

    Raises:
        ModelError: it's another one.
    """
    vision: Any = config.vision_config
    if vision.model_type not in _TOWERS:
        raise ModelError(
            f"the image encoder of this model is '{vision.model_type}', whose blocks nobody declared",
            f"leave out quant.vision; it's there for {' and '.join(_TOWERS)}",
        )
    blocks = (*attention("layer_norm1", out="out_proj"), *plain("layer_norm2", "mlp.fc1", "mlp.fc2"))
    return Encoder(
        ("model.vision_tower.encoder.layers",), blocks, _heads(vision.num_attention_heads, vision.hidden_size)
    )


def internvl(config: PretrainedConfig) -> Encoder:
    """InternViT. What a part adds to the residual is scaled behind its last Linear, which no fold reaches."""
    vision: Any = config.vision_config
    blocks = (
        *attention("layernorm_before", at="attention", out="projection_layer"),
        *plain("layernorm_after", "mlp.fc1", "mlp.fc2"),
    )
    return Encoder(
        ("model.vision_tower.encoder.layer",), blocks, _heads(vision.num_attention_heads, vision.hidden_size)
    )


def local_and_global(config: PretrainedConfig) -> Encoder:
    """Llama 3.2 Vision has two lists: tiles by themselves, then all together, with a gate behind each part."""
    vision: Any = config.vision_config
    blocks = (*attention("input_layernorm"), *plain("post_attention_layernorm", "mlp.fc1", "mlp.fc2"))
    lists = ("model.vision_model.transformer.layers", "model.vision_model.global_transformer.layers")
    return Encoder(lists, blocks, _heads(vision.attention_heads, vision.hidden_size))


def qwen2(config: PretrainedConfig) -> Encoder:
    """Qwen2-VL."""
    vision: Any = config.vision_config
    heads = _heads(vision.num_heads, vision.embed_dim)
    return Encoder((_QWEN,), (*_behind_norm1(heads), *plain("norm2", "mlp.fc1", "mlp.fc2")), heads)


def qwen2_5(config: PretrainedConfig) -> Encoder:
    """Qwen2.5-VL: a gated feed-forward part."""
    vision: Any = config.vision_config
    heads = _heads(vision.num_heads, vision.hidden_size)
    return Encoder((_QWEN,), (*_behind_norm1(heads), *gated("norm2")), heads)


def qwen3(config: PretrainedConfig) -> Encoder:
    """Qwen3-VL. Mergers read the hidden state behind some blocks and leave it as it is."""
    vision: Any = config.vision_config
    heads = _heads(vision.num_heads, vision.hidden_size)
    return Encoder((_QWEN,), (*_behind_norm1(heads), *plain("norm2", "mlp.linear_fc1", "mlp.linear_fc2")), heads)


def _behind_norm1(heads: Heads) -> tuple[Subset, Subset]:
    """Queries, keys and values of all heads follow one another in one Linear."""
    return fused_attention("norm1", "attn.qkv", "attn.proj", stacked_values(heads))
