"""Perplexity by the GPTQ protocol: windows side by side, the mean cross entropy of each, the mean over windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .measure import Chunk, Text


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

    def details(self) -> str:
        """Nothing: the number is all."""
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``metrics.json``."""
        return asdict(self)


class CrossEntropy:
    """Measures the cross entropy of each next token, in nats."""

    compares = False

    def __init__(self) -> None:
        self._seen: dict[str, dict[int, list[Tensor]]] = {}

    def see(self, chunk: Chunk) -> None:
        """Keep the chunk's cross entropies, float32 ``[batch, n]``."""
        target = chunk.targets
        found = nn.functional.cross_entropy(chunk.logits.flatten(0, 1), target.flatten(), reduction="none")
        self._seen.setdefault(chunk.state, {}).setdefault(chunk.batch, []).append(found.view_as(target).cpu())

    def losses(self, state: str) -> list[Tensor]:
        """For each batch float32 ``[batch, tokens - 1]``."""
        return [torch.cat(parts, dim=1) for parts in self._seen[state].values()]

    def result(self, kind: str, text: Text, position: str, state: str) -> Perplexity:
        """The perplexity of a state, which the configuration calls ``position``."""
        windows = mean_losses(self.losses(state))
        about = (text.windows, text.seq_len, text.protocol, text.tokens_sha256)
        return Perplexity(text.name, position, perplexity(windows), *about, windows, kind)


def mean_losses(losses: Sequence[Tensor]) -> tuple[float, ...]:
    """Mean of each window. ``losses``: cross entropies ``[batch, tokens - 1]`` in nats, a row for each window."""
    return tuple(float(row.double().mean()) for batch in losses for row in batch)


def perplexity(window_losses: Sequence[float]) -> float:
    """``exp`` of the mean of the windows' mean losses."""
    return math.exp(math.fsum(window_losses) / len(window_losses))
