"""A model as a whole, for what can't be streamed sensibly: which folder holds it, and whether it fits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .export.dense import FakeQuant, Transformed

if TYPE_CHECKING:
    from .prepare import Prepared

_ROOM = 1.2  # times the weights: what a forward needs besides them
_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")  # in the order in which lm-eval looks for them
_UNKNOWN_LENGTH = 2048


@dataclass(frozen=True)
class WholeModel:
    """A folder that Transformers loads.

    Attributes:
        folder: where.
        dtype: to compute in.
        device: where to compute.
        trusted: whether code that comes with it may run.
    """

    folder: Path
    dtype: torch.dtype
    device: torch.device
    trusted: bool

    def load(self) -> PreTrainedModel:
        """All of it, on the device."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=self.dtype, trust_remote_code=self.trusted
        )
        model.to(self.device)  # type: ignore[arg-type]
        model.requires_grad_(False)
        return model  # from_pretrained leaves it as it is evaluated


def why_not_whole(prepared: Prepared, position: str) -> str:
    """Why a state of the model can't be had as a whole model; empty if it can."""
    written = {exporter.name for exporter in prepared.exporters}
    if prepared.skeleton.images is not None:
        return "it reads images, and is loaded block by block only"
    if position == "pretrain" and prepared.checkpoint.says:
        return f"its checkpoint is decoded as it's read ({prepared.checkpoint.says})"
    if position == "transformed" and Transformed.name not in written:
        return f"no folder of it is written ({Transformed.name})"
    if position.startswith("fake_quant"):
        if (rounded := _rounded_while_running(prepared, position)) is not None:
            return f"{rounded}, which no loader of a plain folder does"
        if FakeQuant.name not in written:
            return f"no folder of it is written that Transformers loads ({FakeQuant.name})"
    needed, free = whole_bytes(prepared), _free(prepared.device)
    if needed * _ROOM > free:
        return f"it takes {needed / 1e9:.1f} GB on {prepared.device}, where {free / 1e9:.1f} GB are free"
    return ""


def _rounded_while_running(prepared: Prepared, position: str) -> str | None:
    recipe = prepared.recipe
    if recipe.acts or recipe.clusters:
        return "activations are rounded while it runs"
    if recipe.kv is not None and position == "fake_quant":
        return "its KV cache is rounded while it runs"
    return None


def whole_model(prepared: Prepared, run: Path | None, position: str) -> WholeModel:
    """The folder of a state of the model; ``run`` is what a run has written."""
    folder = prepared.folder
    if run is not None and position != "pretrain":
        folder = run / (Transformed if position == "transformed" else FakeQuant).folder
    model = prepared.skeleton.model
    return WholeModel(folder, model.dtype, prepared.device, prepared.config.model.trust_remote_code)


def whole_bytes(prepared: Prepared) -> int:
    """Bytes of all weights in the computing dtype."""
    count = sum(math.prod(entry.shape) for entry in prepared.entries.values())
    return count * int(prepared.skeleton.model.dtype.itemsize)


def _free(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def context_length(config: Any, tokenizer: Any) -> int:
    """How many tokens a model reads, found as lm-eval finds it.

    Args:
        config: the model's, as Transformers has it.
        tokenizer: asked where the configuration says nothing.
    """
    known = config.get_text_config().to_dict()
    named = next((known[name] for name in _LENGTHS if known.get(name) is not None), tokenizer.model_max_length)
    return int(named) if named < 10**20 else _UNKNOWN_LENGTH  # Transformers' number for "not said" is above that
