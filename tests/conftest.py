"""Tiny checkpoints of every supported family, and the parts of the engine around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from llmc.models import ModelAdapter, Subset, find_adapter
from llmc.models.layouts import StoredLayout, layout_of
from llmc.stream.decoders import open_checkpoint
from llmc.stream.decoding import Checkpoint
from llmc.stream.headers import TensorEntry
from llmc.stream.skeleton import Skeleton, load_config
from llmc.stream.source import BlockSource

settings.register_profile("llmc", deadline=None, database=None)  # a disk may be slow to sync
settings.load_profile("llmc")
torch.set_num_threads(1)  # tiny models: more threads only wait for each other

VOCAB, BLOCKS = 208, 4
SHAPE = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
GQA = {**SHAPE, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 64}
OPT = {**SHAPE, "ffn_dim": 128, "max_position_embeddings": 64, "word_embed_proj_dim": 64, "dropout": 0.0}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GQA, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**GQA, tie_word_embeddings=True),
    "mistral": MistralConfig(**GQA, sliding_window=8),
    "qwen2": Qwen2Config(**GQA),
    "qwen3": Qwen3Config(**GQA, head_dim=16),
    "opt": OPTConfig(**OPT),
    "opt-post-norm": OPTConfig(**OPT, do_layer_norm_before=False),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=BLOCKS, n_head=4, n_positions=64, n_inner=128),
}


@dataclass(frozen=True)
class Tiny:
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
    def subsets(self) -> tuple[Subset, ...]:
        """Of the first block."""
        return self.block_subsets[0]

    @property
    def block_subsets(self) -> tuple[tuple[Subset, ...], ...]:
        return self.adapter.block_subsets(self.config, self.skeleton().blocks)

    @property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder)

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """As they are stored."""
        return dict(self.checkpoint.stored)

    @property
    def layout(self) -> StoredLayout | None:
        """How the family's checkpoints hold its Linears."""
        return layout_of(self.config.model_type)

    def model(self) -> PreTrainedModel:
        """The whole model as transformers loads it."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval().requires_grad_(False)

    def skeleton(self, dtype: torch.dtype = torch.float32) -> Skeleton:
        """The model without weights."""
        adapter, cpu = self.adapter, torch.device("cpu")
        names = self.checkpoint.entries
        return Skeleton(self.config, names, blocks=adapter.blocks, head=adapter.head, dtype=dtype, device=cpu)

    def source(self, skeleton: Skeleton) -> BlockSource:
        """The weights by the skeleton's units."""
        checkpoint = self.checkpoint
        return BlockSource(checkpoint.units(skeleton.units), checkpoint.decode)

    def loaded(self) -> Skeleton:
        """The model with all its weights, loaded unit by unit."""
        skeleton = self.skeleton()
        source = self.source(skeleton)
        for unit in skeleton.units:
            skeleton.load(source.take(unit))
        source.close()
        skeleton.tie()
        return skeleton


def write_checkpoint(config: PreTrainedConfig, folder: Path) -> None:
    """Random weights, also in norms and biases: a parameter that isn't loaded shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """A tiny checkpoint by its name in ``CONFIGS``; written once. Copy it before you change it."""
    written: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in written:
            folder = tmp_path_factory.mktemp(name)
            write_checkpoint(CONFIGS[name], folder)
            written[name] = Tiny(name, folder)
        return written[name]

    return get


@pytest.fixture(params=CONFIGS)
def tiny(request: pytest.FixtureRequest, checkpoint: Callable[[str], Tiny]) -> Tiny:
    """Each tiny checkpoint in turn."""
    return checkpoint(request.param)


@pytest.fixture
def llama(checkpoint: Callable[[str], Tiny]) -> Tiny:
    """Grouped-query attention, untied embeddings."""
    return checkpoint("llama")


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Random token ids ``[batch, count]``, the same for the same arguments."""

    def make(batch: int, count: int, seed: int = 0) -> Tensor:
        return torch.randint(VOCAB, (batch, count), generator=torch.Generator().manual_seed(seed))

    return make
