"""What the algorithms must know of an architecture, as data: its blocks, and the Linears that share an input."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers import PretrainedConfig

Space = Literal["residual", "heads", "ffn", "inner"]


@dataclass(frozen=True)
class Subset:
    """Linears of a block that read the *same* tensor, in the order in which the block runs them.

    Attributes:
        linears: names inside the block, such as ``self_attn.q_proj``. Of a mixture, those of all experts that read
            their tokens' rows of the tensor, in front of a shared expert's.
        prev: the module that can absorb a scale of that tensor (a norm or a Linear); None if nothing can.
        inspect: the smallest module whose output sees the effect; ``""`` is the block.
        reads: the space of the shared input. ``heads`` is the attention's output, grouped by query head; a subset that
            reads it has the value projection as ``prev``.
        writes: the space of the outputs; ``inner`` if they go into several (attention and feed-forward side by side);
            None if nobody declared it.
        orderable: of the subset that makes queries, keys and values, in this order: whether a head's channels of
            queries and keys may change places. A rotary embedding, which turns channel ``i`` with ``i + dim / 2`` by an
            angle of their own, forbids it.
        also: further modules with a weight ``[.., in]`` that read the tensor and are never compressed: a mixture's
            router, the gate of a shared expert. What is folded into ``prev`` is made up for in them, too.
        rows: of a ``prev`` that is a Linear and makes more than that tensor: the ranges ``(start, stop)`` of its rows
            that do make it, in the order of the tensor's channels; None: all.
        offset: what a norm that is ``prev`` adds to its weight before it multiplies by it (Gemma's: 1).
        fused: the Linears that backends run as one; None: all of them.
        experts: the module of a mixture's experts, if some of the Linears are theirs.
    """

    linears: tuple[str, ...]
    prev: str | None
    inspect: str
    reads: Space = "residual"
    writes: Space | None = None
    orderable: bool = False
    also: tuple[str, ...] = ()
    rows: tuple[tuple[int, int], ...] | None = None
    offset: float = 0.0
    fused: tuple[tuple[str, ...], ...] | None = None
    experts: str | None = None

    @property
    def key(self) -> str:
        """Its name in the journal; one name stands for the same Linear of several experts."""
        if self.experts is None or len(self.parts) == 1:
            return "+".join(self.linears)
        begin = f"{self.experts}."
        return "+".join(dict.fromkeys(re.sub(rf"^{re.escape(begin)}\d+", f"{begin}*", name) for name in self.linears))

    @property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """The Linears that see the same tokens: all of them, but each expert's on their own."""
        if self.experts is None:
            return (self.linears,)
        by_expert: dict[str, list[str]] = {}
        for name in self.linears:
            routed = name.startswith(f"{self.experts}.")
            by_expert.setdefault(name.rpartition(".")[0] if routed else "", []).append(name)
        return tuple(map(tuple, by_expert.values()))

    def fused_with(self, linear: str) -> tuple[str, ...]:
        """The Linears that backends run as one with one of its own, that among them."""
        if self.fused is None:
            return self.linears
        return next((group for group in self.fused if linear in group), (linear,))


@dataclass(frozen=True)
class Residual:
    """The residual stream outside of the blocks.

    Attributes:
        writers: the modules in front of the blocks whose weights' rows are added to it.
        linears: the Linears there whose outputs are, such as the last of a projector of image features; ``*`` stands
            for any number.
        vectors: the parameters there that are it themselves.
        norm: the norm behind the last block.
        readers: the Linears that read that norm's output; they have no bias, or one that nothing must change.
        offset: what the norm adds to its weight before it multiplies by it.
        keeps_mean: whether norms subtract the mean (LayerNorm), so that a rotation must commute with that.
    """

    writers: tuple[str, ...]
    norm: str
    readers: tuple[str, ...]
    keeps_mean: bool = False
    offset: float = 0.0
    linears: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heads:
    """Attention geometry: with fewer key-value heads than query heads, a value head feeds ``query // kv`` slices."""

    query: int
    kv: int
    dim: int


@dataclass(frozen=True)
class Encoder:
    """The blocks of an image encoder. All of them are built alike.

    Attributes:
        lists: dotted paths of its lists of blocks inside the whole model, in the order in which they run.
        subsets: of each block, in execution order.
        heads: attention geometry.
    """

    lists: tuple[str, ...]
    subsets: tuple[Subset, ...]
    heads: Heads


@dataclass(frozen=True)
class Images:
    """What a family that reads images has besides its language blocks. Encoder and projector stand in front of them.

    Attributes:
        encoder: from the whole model's config to the encoder's blocks; raises ModelError with the reason where they
            can't be compressed.
        mark: the text that stands for an image in a prompt, as the model's processor wants it.
        optional: the child of those blocks that a forward without images leaves out; "": it calls every block.
        between: whether features of the image are added to the hidden state between blocks, too.
        looks_ahead: whether tokens of an image attend to those behind them.
    """

    mark: str
    encoder: Callable[[PretrainedConfig], Encoder]
    optional: str = ""
    between: bool = False
    looks_ahead: bool = False

    def may_skip(self, block: nn.Module) -> bool:
        """Whether a forward may leave a block out."""
        return any(name == self.optional for name, _ in block.named_children())


def heads_of(config: Any) -> Heads:
    """Attention geometry of a transformers config."""
    query = config.num_attention_heads
    return Heads(
        query=query,
        kv=getattr(config, "num_key_value_heads", None) or query,
        dim=getattr(config, "head_dim", None) or config.hidden_size // query,
    )


@dataclass(frozen=True)
class ModelAdapter:
    """A family of decoder-only models, or of such that read images besides.

    Attributes:
        name: what ``model.type`` says in a YAML file.
        model_types: the ``model_type`` values of ``config.json`` that it serves.
        blocks: dotted path of the list of (language) blocks inside the whole model.
        head: names of the modules behind the last block; whatever is neither here nor in a block comes before it.
        subsets: from the model's (text) config and a block, which may be empty (on the meta device), to that block's
            subsets, in execution order.
        aliases: further values of ``model.type``.
        heads: from the same config to the attention's geometry.
        residual: from the same config to the residual stream outside of the blocks; raises ModelError with the reason
            where it can't be rotated. None if nobody declared it.
        images: how it reads images; None: it doesn't. The whole is then Transformers' model for images and text, else
            its causal language model.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    head: tuple[str, ...]
    subsets: Callable[[PretrainedConfig, nn.Module], tuple[Subset, ...]]
    aliases: tuple[str, ...] = ()
    heads: Callable[[PretrainedConfig], Heads] = field(default=heads_of)
    residual: Callable[[PretrainedConfig], Residual] | None = None
    images: Images | None = None

    def block_subsets(self, config: PretrainedConfig, blocks: Iterable[nn.Module]) -> tuple[tuple[Subset, ...], ...]:
        """The subsets of each block of a model."""
        return tuple(self.subsets(config, block) for block in blocks)
