"""A tiny checkpoint, and the parts of the engine around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmc.models import ModelAdapter, Subset, find_adapter
from llmc.stream.headers import TensorEntry, read_headers
from llmc.stream.skeleton import Skeleton, load_config
from llmc.stream.source import BlockSource


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
    def entries(self) -> dict[str, TensorEntry]:
        return read_headers(self.folder)

    def model(self) -> PreTrainedModel:
        """The whole model as transformers loads it."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval().requires_grad_(False)

    def skeleton(self, dtype: torch.dtype = torch.float32) -> Skeleton:
        """The model without weights."""
        adapter, cpu = self.adapter, torch.device("cpu")
        return Skeleton(self.config, self.entries, blocks=adapter.blocks, head=adapter.head, dtype=dtype, device=cpu)

    def source(self, skeleton: Skeleton) -> BlockSource:
        """The weights by the skeleton's units."""
        entries = self.entries
        return BlockSource({unit: [entries[name] for name in names] for unit, names in skeleton.units.items()})

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
    """Random weights, also in norms, biases and what a router has: a tensor that isn't loaded shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        stored = model.state_dict()
        buffers = [tensor for name, tensor in model.named_buffers() if name in stored and tensor.is_floating_point()]
        for tensor in (*model.parameters(), *buffers):
            tensor.add_(torch.randn_like(tensor), alpha=0.15)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")


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
