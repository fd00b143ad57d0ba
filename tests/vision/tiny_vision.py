"""A tiny model of every vision-language family, and an image-text sample for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    MllamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from llmc.models import ModelAdapter, Subset, find_adapter
from llmc.stream.batch import Batch
from llmc.stream.empty import load_config
from llmc.stream.headers import TensorEntry, read_headers
from llmc.stream.skeleton import Skeleton
from llmc.stream.source import BlockSource

VOCAB, BLOCKS, WIDTH, IMAGE = 240, 3, 64, 205  # the last: the token in whose place image features go
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}  # more than BLOCKS
PIXELS, PATCH = 16, 4
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 206, "vision_start_token_id": 207, "vision_end_token_id": 208}


def _llava(kind: type[PreTrainedConfig], tower: str, **changes: Any) -> PreTrainedConfig:
    return kind(
        vision_config={"model_type": tower, **CLIP, "image_size": PIXELS, "patch_size": PATCH},
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
        **changes,
    )


def _qwen2(kind: type[PreTrainedConfig], **vision: Any) -> PreTrainedConfig:
    return kind(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={"depth": 2, "num_heads": 2, "patch_size": PATCH, "in_channels": 3, **vision},
        tie_word_embeddings=False,
        **QWEN_TOKENS,
    )


CONFIGS: dict[str, PreTrainedConfig] = {
    "llava": _llava(LlavaConfig, "clip_vision_model"),
    "llava_onevision": _llava(LlavaOnevisionConfig, "siglip_vision_model", image_grid_pinpoints=[[16, 16]]),
    "qwen2_vl": _qwen2(Qwen2VLConfig, embed_dim=32, hidden_size=WIDTH, mlp_ratio=2),
    "qwen2_5_vl": _qwen2(
        Qwen2_5_VLConfig,
        hidden_size=32,
        intermediate_size=48,
        out_hidden_size=WIDTH,
        window_size=16,
        fullatt_block_indexes=[1],
    ),
    "qwen3_vl": _qwen2(
        Qwen3VLConfig,
        hidden_size=32,
        intermediate_size=48,
        out_hidden_size=WIDTH,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    ),
    "mllama": MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": PIXELS,
            "patch_size": PATCH,
            "max_num_tiles": 2,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config={**TEXT, "cross_attention_layers": [1, 2]},
        image_token_index=VOCAB,
    ),
    "internvl": InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [PIXELS, PIXELS],
            "patch_size": [PATCH, PATCH],
        },
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    ),
    "gemma3": Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **CLIP, "image_size": PIXELS, "patch_size": PATCH},
        text_config={
            **TEXT,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": True,
        },
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=206,
        eoi_token_index=207,
    ),
}
SEVEN = [name for name in CONFIGS if name != "llava_onevision"]


@dataclass(frozen=True)
class Sample:
    """What a processor would give: token ids ``[1, tokens]`` and further inputs."""

    tokens: Tensor
    further: dict[str, Tensor] = field(default_factory=dict)

    @property
    def batch(self) -> Batch:
        return Batch(self.tokens, self.further)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.tokens, **self.further}


def text_sample(count: int = 24, seed: int = 0) -> Sample:
    """Words alone."""
    return Sample(torch.randint(10, 200, (1, count), generator=torch.Generator().manual_seed(seed)))


def image_sample(name: str, seed: int = 0, count: int = 14) -> Sample:
    """Some words, an image, some words."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(10, 200, (count,), generator=generator)
    kind = name.split("_")[0]
    if kind.startswith("qwen"):
        # frames, rows, columns of patches, of which 2 x 2 become one token
        patch = 3 * 2 * PATCH * PATCH
        further = {
            "pixel_values": torch.randn(32, patch, generator=generator),
            "image_grid_thw": torch.tensor([[1, 8, 4]]),
        }
        tokens = torch.cat([words[:5], torch.tensor([207]), torch.full((8,), IMAGE), torch.tensor([208]), words[5:]])
        return Sample(tokens[None], further | {"mm_token_type_ids": (tokens == IMAGE).int()[None]})
    if kind == "mllama":
        further = {
            "pixel_values": torch.randn(1, 1, 2, 3, PIXELS, PIXELS, generator=generator),
            "aspect_ratio_ids": torch.tensor([[2]]),
            "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.int64),
            "cross_attention_mask": torch.ones(1, count + 1, 1, 2, dtype=torch.int64),
        }
        further["cross_attention_mask"][:, :3] = 0  # words in front of the image don't see it
        return Sample(torch.cat([words[:3], torch.tensor([VOCAB]), words[3:]])[None], further)
    features = {"llava": 16, "llava_onevision": 16 + 4 * 5, "internvl": 4, "gemma3": 4}[name]
    tiles = (1, 2) if name == "llava_onevision" else (1,)  # the image whole and in one part, whose rows end with a mark
    further = {"pixel_values": torch.randn(*tiles, 3, PIXELS, PIXELS, generator=generator)}
    if name == "llava_onevision":
        further["image_sizes"] = torch.tensor([[PIXELS, PIXELS]])
    tokens = torch.cat([words[:5], torch.full((features,), IMAGE), words[5:]])
    if kind == "gemma3":
        further["token_type_ids"] = (tokens == IMAGE).int()[None]
    return Sample(tokens[None], further)


@dataclass(frozen=True)
class TinyVision:
    """A checkpoint in shards of a few tensors each, stored in bfloat16."""

    name: str
    folder: Path

    @property
    def config(self) -> PreTrainedConfig:
        return load_config(self.folder, trust_remote_code=False)

    @property
    def adapter(self) -> ModelAdapter:
        return find_adapter("auto", self.config.model_type)

    @property
    def entries(self) -> dict[str, TensorEntry]:
        return read_headers(self.folder)

    def block_subsets(self, skeleton: Skeleton) -> tuple[tuple[Subset, ...], ...]:
        return self.adapter.block_subsets(self.config.get_text_config(), skeleton.blocks)

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The whole model as transformers loads it."""
        return AutoModelForImageTextToText.from_pretrained(self.folder, dtype=dtype).eval().requires_grad_(False)

    def skeleton(self, dtype: torch.dtype = torch.float32) -> Skeleton:
        """The model without weights."""
        adapter = self.adapter
        return Skeleton(
            self.config,
            self.entries,
            blocks=adapter.blocks,
            head=adapter.head,
            dtype=dtype,
            device=torch.device("cpu"),
            images=adapter.images,
        )

    def source(self, skeleton: Skeleton) -> BlockSource:
        entries = self.entries
        return BlockSource({unit: [entries[name] for name in names] for unit, names in skeleton.units.items()})


def write_checkpoint(name: str, folder: Path) -> None:
    """Random weights, also in norms, biases and gates: a parameter that isn't loaded shows."""
    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText
    model = auto.from_config(CONFIGS[name], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")


def fresh_config(name: str) -> PreTrainedConfig:
    """A copy that a test may change."""
    config = CONFIGS[name]
    return AutoConfig.for_model(config.model_type).from_dict(config.to_dict())


def mixed_samples(name: str) -> list[Batch]:
    """Two with an image and one without."""
    return [image_sample(name).batch, text_sample(12).batch, image_sample(name, seed=1).batch]
