"""The model that a run is about, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from .architecture import adapter_of
from .config import Config
from .export import read_config
from .models import ModelAdapter, refuse_foreign_layout
from .models.experts import HostMemory
from .models.locate import locate_checkpoint
from .room import experts_on_host
from .stream.decoders import open_checkpoint
from .stream.decoding import Checkpoint
from .stream.empty import load_config as load_model_config
from .stream.skeleton import Skeleton
from .translate import make_compute_dtype


@dataclass(frozen=True)
class Model:
    """What a configuration's model turns out to be.

    Attributes:
        folder: where it is.
        checkpoint: its tensors.
        config: its ``config.json``.
        adapter: how it's taken apart.
        skeleton: its modules, without weights.
        stored: the dtype of its weights.
        warnings: what the user should know of it.
    """

    folder: Path
    checkpoint: Checkpoint
    config: PretrainedConfig
    adapter: ModelAdapter
    skeleton: Skeleton
    stored: torch.dtype
    warnings: list[str]


def open_model(config: Config, device: torch.device) -> Model:
    """Find the model that a configuration names, and make its modules on the meta device. Reads headers.

    Raises:
        LlmcError: it isn't there, is damaged, or can't be taken apart.
    """
    trust = config.model.trust_remote_code
    folder = locate_checkpoint(config.model.path, trust_remote_code=trust)
    refuse_foreign_layout(_declared_type(folder))
    model_config = load_model_config(folder, trust_remote_code=trust)
    adapter, warnings = adapter_of(config.model, model_config, folder)
    checkpoint = open_checkpoint(folder)
    entries = checkpoint.entries
    names = [name for name, entry in entries.items() if entry.dtype.is_floating_point and len(entry.shape) == 2]
    stored = entries[names[0]].dtype if names else torch.bfloat16
    skeleton = Skeleton(
        model_config,
        entries,
        blocks=adapter.blocks,
        head=adapter.head,
        dtype=make_compute_dtype(config.model.torch_dtype, stored, device),
        device=device,
        trust_remote_code=trust,
        images=adapter.images,
    )
    if experts_on_host(config, skeleton, entries, device):
        skeleton.keep_experts(HostMemory(device))
    return Model(folder, checkpoint, model_config, adapter, skeleton, stored, warnings)


def _declared_type(folder: Path) -> str:
    """What ``config.json`` says, before Transformers reads it and wants a layout's own code; "" if it is damaged,
    of which more is said when it's read."""
    try:
        content = read_config(folder)
    except (ValueError, OSError):
        return ""
    return str(content.get("model_type")) if isinstance(content, dict) else ""
