"""Tiny checkpoints of every supported family, and the parts of the engine around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny import Tiny, checkpoints
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, MistralConfig, OPTConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """A tiny checkpoint by its name in ``CONFIGS``; written once. Copy it before you change it."""
    return checkpoints(CONFIGS, tmp_path_factory.mktemp)


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


@pytest.fixture(scope="session")
def little_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with enough lines for a dry run."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("All in the golden afternoon full leisurely we glide.\n" * 20)
    return file
