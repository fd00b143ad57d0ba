"""A tiny checkpoint, and the parts of the engine around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from dry import write_bytes_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from llmc.eval.measure import Chunk
from llmc.eval.perplexity import CrossEntropy
from llmc.models import ModelAdapter, Subset, find_adapter
from llmc.models.layouts import StoredLayout, layout_of
from llmc.stream.batch import Batch
from llmc.stream.calls import Recorded, head_logits, record
from llmc.stream.decoders import open_checkpoint
from llmc.stream.decoding import Checkpoint
from llmc.stream.empty import load_config
from llmc.stream.headers import TensorEntry
from llmc.stream.skeleton import Skeleton
from llmc.stream.source import BlockSource


@dataclass(frozen=True)
class Tiny:
    """A checkpoint in shards of a few tensors each."""

    name: str
    folder: Path
    remote: bool = False
    """Whether its code comes with it."""

    @property
    def config(self) -> PreTrainedConfig:
        return load_config(self.folder, trust_remote_code=self.remote)

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
        options = {"dtype": torch.float32, "trust_remote_code": self.remote}
        return AutoModelForCausalLM.from_pretrained(self.folder, **options).eval().requires_grad_(False)

    def skeleton(self, dtype: torch.dtype = torch.float32) -> Skeleton:
        """The model without weights."""
        paths = {"blocks": self.adapter.blocks, "head": self.adapter.head}
        options = {"dtype": dtype, "device": torch.device("cpu"), "trust_remote_code": self.remote}
        return Skeleton(self.config, self.checkpoint.entries, **paths, **options)

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


def write_checkpoint(config: PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """A checkpoint of an architecture that Transformers has."""
    torch.manual_seed(0)
    write_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), folder, dtype)


def write_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Random weights, also in norms, biases and what a router has: a tensor that isn't loaded shows."""
    with torch.no_grad():
        stored = model.state_dict()
        buffers = [tensor for name, tensor in model.named_buffers() if name in stored and tensor.is_floating_point()]
        for tensor in (*model.parameters(), *buffers):
            tensor.add_(torch.randn_like(tensor), alpha=0.15)
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB")


def write_byte_model(folder: Path, width: int = 256) -> None:
    """A Llama of two blocks with a tokenizer of bytes; groups of 64 and 128 divide 256."""
    config = LlamaConfig(
        vocab_size=write_bytes_tokenizer(folder),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def checkpoints(configs: Mapping[str, PreTrainedConfig], new_folder: Callable[[str], Path]) -> Callable[[str], Tiny]:
    """Tiny checkpoints by their names in ``configs``, each written once, into a folder that ``new_folder`` makes."""
    written: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in written:
            folder = new_folder(name)
            write_checkpoint(configs[name], folder)
            written[name] = Tiny(name, folder)
        return written[name]

    return get


def recorded(skeleton: Skeleton, ids: Tensor) -> Recorded:
    """How a loaded model calls its blocks on token ids ``[batch, tokens]``."""
    return record(skeleton, Batch(ids), torch.device("cpu"))


def token_losses(skeleton: Skeleton, hidden: Tensor, ids: Tensor) -> Tensor:
    """Cross entropy ``[batch, tokens - 1]`` of each next token, by the loaded head on the last block's output."""
    logits = head_logits(skeleton, hidden, ids)
    measure = CrossEntropy()
    measure.see(Chunk("pretrain", 0, 0, ids, logits[:, :-1]))
    return measure.losses("pretrain")[0]
