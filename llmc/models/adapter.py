"""What the algorithms must know of an architecture, as data: its blocks, and the Linears that share an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

Space = Literal["residual", "heads", "ffn"]


@dataclass(frozen=True)
class Subset:
    """Linears of a block that read the *same* tensor, in the order in which the block runs them.

    Attributes:
        linears: names inside the block, such as ``self_attn.q_proj``.
        prev: the module that can absorb a scale of that tensor (a norm or a Linear); None if nothing can.
        inspect: the smallest module whose output sees the effect; ``""`` is the block.
        reads: the space of the shared input. ``heads`` is the attention's output, grouped by query head; a subset that
            reads it has the value projection as ``prev``.
        writes: the space of the outputs; None if nobody declared it.
        orderable: of the subset that makes queries, keys and values, in this order: whether a head's channels of
            queries and keys may change places. A rotary embedding, which turns channel ``i`` with ``i + dim / 2`` by an
            angle of their own, forbids it.
    """

    linears: tuple[str, ...]
    prev: str | None
    inspect: str
    reads: Space = "residual"
    writes: Space | None = None
    orderable: bool = False

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return "+".join(self.linears)


@dataclass(frozen=True)
class Residual:
    """The residual stream outside of the blocks.

    Attributes:
        writers: the modules in front of the blocks whose weights' rows are added to it.
        norm: the norm behind the last block.
        readers: the Linears that read that norm's output; they have no bias, or one that nothing must change.
        keeps_mean: whether norms subtract the mean (LayerNorm), so that a rotation must commute with that.
    """

    writers: tuple[str, ...]
    norm: str
    readers: tuple[str, ...]
    keeps_mean: bool = False


@dataclass(frozen=True)
class Heads:
    """Attention geometry: with fewer key-value heads than query heads, a value head feeds ``query // kv`` slices."""

    query: int
    kv: int
    dim: int


@dataclass(frozen=True)
class ModelAdapter:
    """A family of decoder-only models.

    Attributes:
        name: what ``model.type`` says in a YAML file.
        model_types: the ``model_type`` values of ``config.json`` that it serves.
        blocks: dotted path of the list of blocks inside the causal language model.
        head: names of the modules behind the last block; whatever is neither here nor in a block comes before it.
        subsets: from the model's (text) config to a block's subsets, in execution order.
        aliases: further values of ``model.type``.
        residual: from the same config to the residual stream outside of the blocks; raises ModelError with the reason
            where it can't be rotated. None if nobody declared it.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    head: tuple[str, ...]
    subsets: Callable[[PretrainedConfig], tuple[Subset, ...]]
    aliases: tuple[str, ...] = ()
    residual: Callable[[PretrainedConfig], Residual] | None = None


def heads_of(config: Any) -> Heads:
    """Attention geometry of a transformers config."""
    query = config.num_attention_heads
    return Heads(
        query=query,
        kv=getattr(config, "num_key_value_heads", None) or query,
        dim=getattr(config, "head_dim", None) or config.hidden_size // query,
    )
