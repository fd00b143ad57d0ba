"""OLMo 2 and 3: norms stand behind the branches only; q, k, v and gate, up read the residual itself."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import ModelAdapter, Subset
from .parts import BEHIND_BRANCHES, attention, gated, never_rotated


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """Nothing in front of them could absorb a scale of the residual."""
    return (*attention(None), *gated(None))


OLMO2 = ModelAdapter(
    "Olmo2",
    ("olmo2", "olmo3"),
    "model.layers",
    ("model.norm", "lm_head"),
    subsets,
    residual=never_rotated("Olmo2", BEHIND_BRANCHES),
)
