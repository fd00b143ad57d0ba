"""Perplexity by the GPTQ protocol: windows side by side, the mean cross entropy of each, the mean over windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Perplexity:
    """One measured number with everything needed to compare it.

    Attributes:
        name: the text (``wikitext2``).
        position: which model (``pretrain`` is the original, ``fake_quant`` the compressed one).
        value: ``exp`` of the mean over windows of the mean next-token cross entropy in nats.
        windows: how many.
        seq_len: tokens in each.
        protocol: text, split, tokenization and windowing in words.
        tokens_sha256: digest of the token ids.
        window_losses: mean cross entropy of each window, so that any part of the text can be compared later.
        kind: ``ppl``; or ``decode_ppl`` where each token was appended to a KV cache and attended to it.
    """

    name: str
    position: str
    value: float
    windows: int
    seq_len: int
    protocol: str
    tokens_sha256: str
    window_losses: tuple[float, ...]
    kind: str = "ppl"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``metrics.json``."""
        return asdict(self)


def mean_losses(losses: Sequence[Tensor]) -> tuple[float, ...]:
    """Mean of each window. ``losses``: cross entropies ``[batch, tokens - 1]`` in nats, a row for each window."""
    return tuple(float(row.double().mean()) for batch in losses for row in batch)


def perplexity(window_losses: Sequence[float]) -> float:
    """``exp`` of the mean of the windows' mean losses."""
    return math.exp(math.fsum(window_losses) / len(window_losses))
