"""How far a model's predictions are from the original's: Kullback-Leibler divergence and agreement of the best tokens.

Perplexity compares a model with a text, and errors that make some tokens likelier and others less cancel in it; these
numbers compare it with the original, token by token, where nothing cancels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .measure import Chunk, Text

_TOP = 5
_TOKENS = 32  # are compared at a time: copies of their logits are float64
_QUANTILES = (0.5, 0.99)


@dataclass(frozen=True)
class TokenAgreement:
    """What one model's predictions have in common with the original's.

    Attributes:
        name: the text (``wikitext2``).
        position: which model.
        value: share of the tokens for which both models' likeliest next token is the same.
        top5: share of the tokens for which the original's likeliest is among the model's five likeliest.
        kl: mean over the tokens of ``KL(original || model)`` of the next token's distribution, in nats.
        kl_quantiles: of the same over the tokens: ``0.5``, ``0.99`` (numpy's linear interpolation) and ``max``.
        tokens: how many next tokens were predicted.
        windows: of the text.
        seq_len: tokens in each.
        protocol: text, split, tokenization and windowing in words.
        tokens_sha256: digest of the token ids.
        kind: what ``eval.type`` calls it.
    """

    name: str
    position: str
    value: float
    top5: float
    kl: float
    kl_quantiles: Mapping[str, float]
    tokens: int
    windows: int
    seq_len: int
    protocol: str
    tokens_sha256: str
    kind: str = "token_acc"

    def details(self) -> str:
        """The other numbers, in words."""
        high, most = self.kl_quantiles[str(_QUANTILES[1])], self.kl_quantiles["max"]
        return (
            f"top-5 {self.top5:.4f}, KL {self.kl:.3g} nats per token (99 % below {high:.3g}, at most {most:.3g}), "
            f"{self.tokens} tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``metrics.json``."""
        return asdict(self)


@dataclass
class _Seen:
    """Of one state: each token's divergence, float64, and how many of its predictions agreed."""

    divergences: list[Tensor] = field(default_factory=list)
    same: int = 0
    near: int = 0


class Divergence:
    """Compares a state's predictions with the original's."""

    compares = True

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def see(self, chunk: Chunk) -> None:
        """Add a chunk's tokens.

        Raises:
            ValueError: the original's logits are missing.
        """
        if chunk.original is None:
            raise ValueError("a comparison needs the original's logits")
        seen = self._seen.setdefault(chunk.state, _Seen())
        vocabulary = chunk.logits.shape[-1]
        pairs = [torch.split(one.reshape(-1, vocabulary), _TOKENS) for one in (chunk.original, chunk.logits)]
        for original, logits in zip(*pairs, strict=True):
            seen.divergences.append(divergence(original, logits).cpu())
            rank = ranks(original, logits)
            seen.same += int((logits.argmax(-1) == original.argmax(-1)).sum())
            seen.near += int((rank < _TOP).sum())

    def divergences(self, state: str) -> Tensor:
        """Of each predicted token, in the order in which they came: float64 ``[tokens]``, in nats."""
        return torch.cat(self._seen[state].divergences)

    def result(self, kind: str, text: Text, position: str, state: str) -> TokenAgreement:
        """The agreement of a state, which the configuration calls ``position``, with the original."""
        seen, each = self._seen[state], self.divergences(state)
        count, ordered = len(each), each.sort().values
        quantiles = {str(share): _quantile(ordered, share) for share in _QUANTILES} | {"max": float(ordered[-1])}
        return TokenAgreement(
            text.name,
            position,
            seen.same / count,
            seen.near / count,
            float(each.mean()),
            quantiles,
            count,
            text.windows,
            text.seq_len,
            text.protocol,
            text.tokens_sha256,
            kind,
        )


def divergence(original: Tensor, logits: Tensor) -> Tensor:
    """``KL(original || model)`` of each token in nats: the sum over the vocabulary of ``p (log p - log q)``.

    Args:
        original: logits of the original, float32 ``[..., vocabulary]``.
        logits: of the model, alike.

    Returns:
        Float64 ``[...]``, and computed in it: the float32 normalization of a logarithm is wrong by up to 1e-6 for all
        tokens alike, as much as a good 8-bit model diverges. At least 0: what rounding leaves below isn't said.
    """
    log_p, log_q = original.double().log_softmax(-1), logits.double().log_softmax(-1)
    # What the original never says adds nothing, whatever the model makes of it.
    each = (log_p - log_q).masked_fill_(log_p.isneginf(), 0.0).mul_(log_p.exp())
    return each.sum(-1).clamp_min_(0.0)


def ranks(original: Tensor, logits: Tensor) -> Tensor:
    """How many tokens the model finds likelier than the original's likeliest one; int64 ``[...]``."""
    chosen = logits.gather(-1, original.argmax(-1, keepdim=True))
    return (logits > chosen).sum(-1)


def _quantile(ordered: Tensor, share: float) -> float:
    """Of sorted values, between two of them by linear interpolation."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
