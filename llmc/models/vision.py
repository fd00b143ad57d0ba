"""Models that read images and text: the language blocks of each family, and how images get to them.

Encoder and projector are whatever stands in front of the blocks: there they run whole. The encoder's own blocks may
have been compressed before (``encoders.py``). The projector's output takes the place of the image tokens' embeddings,
so who writes it writes the residual; Mllama's goes to the cross-attention of some blocks instead.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PretrainedConfig

from . import encoders, gemma, llama
from .adapter import Images, ModelAdapter, Residual, Subset

_BLOCKS = "model.language_model.layers"
_NORM = "model.language_model.norm"
_EMBEDDING = ("model.language_model.embed_tokens",)
_QWEN = "<|vision_start|><|image_pad|><|vision_end|>"


def _projected(config: PretrainedConfig) -> Residual:
    """A projector of two Linears."""
    return Residual(_EMBEDDING, _NORM, ("lm_head",), linears=("model.multi_modal_projector.linear_2",))


def _with_newline(config: PretrainedConfig) -> Residual:
    """The same, and a learned vector at the end of each row of an image. Features are pooled and interpolated between
    positions, never between channels."""
    projector = ("model.multi_modal_projector.linear_2",)
    return Residual(_EMBEDDING, _NORM, ("lm_head",), linears=projector, vectors=("model.image_newline",))


def _merged(config: PretrainedConfig) -> Residual:
    """Qwen2-VL's encoder ends with a merger of patches."""
    return Residual(_EMBEDDING, _NORM, ("lm_head",), linears=("model.visual.merger.mlp.2",))


def _merged_in_several_places(config: PretrainedConfig) -> Residual:
    """Qwen3-VL's encoder has more of them, for what is added behind the first blocks."""
    mergers = ("model.visual.merger.linear_fc2", "model.visual.deepstack_merger_list.*.linear_fc2")
    return Residual(_EMBEDDING, _NORM, ("lm_head",), linears=mergers)


def _crossed(config: PretrainedConfig) -> Residual:
    """Mllama's image features never enter it."""
    return Residual(_EMBEDDING, _NORM, ("lm_head",))


def mllama_subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """Llama's; where a block attends to the image, its keys and values read the image features, which nothing in a
    block can scale."""
    own = llama.subsets(config, block)
    if not _CROSSING.may_skip(block):
        return own
    keys_and_values = ("cross_attn.k_proj", "cross_attn.v_proj")
    return (
        Subset(("cross_attn.q_proj",), "input_layernorm", "cross_attn", writes="heads"),
        Subset(keys_and_values, None, "cross_attn", reads="inner", writes="heads"),
        Subset(("cross_attn.o_proj",), "cross_attn.v_proj", "cross_attn.o_proj", reads="heads", writes="residual"),
        *own[2:],
    )


_CROSSING = Images("<|image|>", encoders.local_and_global, optional="cross_attn")


def _family(
    name: str,
    model_type: str,
    images: Images,
    residual: Callable[[PretrainedConfig], Residual],
    subsets: Callable[[PretrainedConfig, nn.Module], tuple[Subset, ...]] = llama.subsets,
    aliases: tuple[str, ...] = (),
) -> ModelAdapter:
    """They all have their language blocks in one place."""
    head = (_NORM, "lm_head")
    return ModelAdapter(name, (model_type,), _BLOCKS, head, subsets, aliases, residual=residual, images=images)


VISION = (
    _family("Llava", "llava", Images("<image>", encoders.tower), _projected, aliases=("LlavaHf",)),
    _family("Llava_OneVision", "llava_onevision", Images("<image>", encoders.tower), _with_newline),
    _family("Qwen2VL", "qwen2_vl", Images(_QWEN, encoders.qwen2), _merged),
    _family("Qwen2.5VL", "qwen2_5_vl", Images(_QWEN, encoders.qwen2_5), _merged),
    _family("Qwen3VL", "qwen3_vl", Images(_QWEN, encoders.qwen3, between=True), _merged_in_several_places),
    _family("Mllama", "mllama", _CROSSING, _crossed, mllama_subsets),
    _family("InternVL2", "internvl", Images("<IMG_CONTEXT>", encoders.internvl), _projected),
    _family(
        "Gemma3", "gemma3", Images("<start_of_image>", encoders.tower, looks_ahead=True), gemma.refused, gemma.later
    ),
)
