"""What blocks of many families are made of, for their adapters to put together."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PretrainedConfig

from ..errors import ModelError
from .adapter import Heads, Residual, Subset

Pair = tuple[Subset, Subset]
"""The subset that reads the residual, and the one that writes it, of an attention or a feed-forward part."""

Ranges = tuple[tuple[int, int], ...]

BEHIND_BRANCHES = (
    "a norm stands behind each branch, and its weight scales what is added to the residual channel by channel"
)


def attention(norm: str | None, *, at: str = "self_attn", out: str = "o_proj", offset: float = 0.0) -> Pair:
    """Queries, keys and values by a Linear each, behind ``norm``; ``offset`` is what that adds to its weight."""
    qkv = (f"{at}.q_proj", f"{at}.k_proj", f"{at}.v_proj")
    return (
        Subset(qkv, norm, at, writes="heads", offset=offset),
        Subset((f"{at}.{out}",), f"{at}.v_proj", f"{at}.{out}", reads="heads", writes="residual"),
    )


def fused_attention(norm: str | None, qkv: str, out: str, values: Ranges) -> Pair:
    """Queries, keys and values by one Linear ``qkv``, whose rows ``values`` make the values."""
    at = qkv.rpartition(".")[0]
    return (
        Subset((qkv,), norm, at, writes="heads"),
        Subset((out,), qkv, out, reads="heads", writes="residual", rows=values),
    )


def grouped_values(heads: Heads) -> Ranges:
    """The rows of the values where each key-value head follows the query heads that read it: queries, key, value."""
    width = (heads.query // heads.kv + 2) * heads.dim
    return tuple((stop - heads.dim, stop) for stop in range(width, heads.kv * width + 1, width))


def stacked_values(heads: Heads) -> Ranges:
    """The rows of the values where they follow all queries and all keys."""
    start = (heads.query + heads.kv) * heads.dim
    return ((start, start + heads.kv * heads.dim),)


def gated(norm: str | None, *, at: str = "mlp", offset: float = 0.0) -> Pair:
    """A gated feed-forward part. Its activation is the gate's: a scale of the product is absorbed by the other half."""
    return (
        Subset((f"{at}.gate_proj", f"{at}.up_proj"), norm, at, writes="ffn", offset=offset),
        Subset((f"{at}.down_proj",), f"{at}.up_proj", f"{at}.down_proj", reads="ffn", writes="residual"),
    )


def fused_gated(norm: str | None, gate_up: str, down: str, width: int) -> Pair:
    """The same with the gate's ``width`` rows and then those of the other half in one Linear."""
    at = gate_up.rpartition(".")[0]
    return (
        Subset((gate_up,), norm, at, writes="ffn"),
        Subset((down,), gate_up, down, reads="ffn", writes="residual", rows=((width, 2 * width),)),
    )


def plain(norm: str | None, up: str, down: str) -> Pair:
    """Two Linears with an activation between them that lets no scale pass, such as GELU."""
    return Subset((up,), norm, up, writes="ffn"), Subset((down,), None, down, reads="ffn", writes="residual")


def side_by_side(attention: Pair, feed_forward: Pair) -> tuple[Subset, ...]:
    """Both parts behind the same norm: one subset, of which backends run each part's Linears as one."""
    first, second = attention[0].linears, feed_forward[0].linears
    both = Subset(first + second, attention[0].prev, "", writes="inner", fused=(first, second))
    return both, attention[1], feed_forward[1]


def unrotatable(family: str, reason: str) -> ModelError:
    """The error of a family, or of one of its models, whose residual can't be rotated."""
    return ModelError(
        f"the residual of this {family} model can't be rotated: {reason}", "use a method without a rotation"
    )


def never_rotated(family: str, reason: str) -> Callable[[PretrainedConfig], Residual]:
    """A family's ``residual`` where none of its models can be rotated."""

    def residual(config: PretrainedConfig) -> Residual:
        raise unrotatable(family, reason)

    return residual
