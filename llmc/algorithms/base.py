"""What an algorithm is, and what it may ask of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from ..linalg import OnlineRotation
from ..models import Heads, Residual, Space, Subset
from ..quant import QuantSpec, Scheme
from .views import BlockView, SubsetView, TuneNote


class Options(BaseModel):
    """Base of the options of a method: the keys of ``quant.special`` in a YAML file. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _names(value: object) -> object:
    """A YAML list, or a name alone, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Layers = Annotated[
    Annotated[tuple[str, ...], Field(min_length=1)] | None,
    BeforeValidator(_names),
    Field(
        description="The Linears that it changes, such as [down_proj]; those that read one input (q, k, v; gate, up) "
        "belong together. By default all.",
    ),
]
"""An option of transforms: the Linears they are limited to, by their names in a block or the last part of these."""


def is_named(linear: str, name: str) -> bool:
    """Whether ``name``, such as ``down_proj`` or ``mlp.down_proj``, means the Linear with this name in its block."""
    return linear == name or linear.endswith(f".{name}")


@dataclass(frozen=True)
class Needs:
    """What an algorithm asks of the engine.

    Attributes:
        data: statistics of calibration tokens.
        sequential: a subset's statistics must come from inputs that the already compressed subsets produced.
        compressed_stream: calibrate on the compressed model's activations (``quant_out``, ``sparsity_out``) rather than
            the original's.
        targets: the original block's outputs on the original's inputs, to learn them.
    """

    data: bool
    sequential: bool = False
    compressed_stream: bool = False
    targets: bool = False


@dataclass(frozen=True)
class Frame:
    """What a transform that needs no data may know of the whole model.

    Attributes:
        subsets: those of each block.
        heads: attention geometry.
        residual: who writes and reads the residual outside of the blocks.
        width: channels of the residual.
        seed: ``base.seed``, of every random choice.
        ffn: channels between the feed-forward's Linears; 0 where blocks differ.
    """

    subsets: tuple[tuple[Subset, ...], ...]
    heads: Heads
    residual: Residual
    width: int
    seed: int
    ffn: int = 0


@dataclass(frozen=True)
class Online:
    """Rotations that run with a changed model.

    Attributes:
        ffn: of what the Linears read that read the space ``ffn``; these hold its inverse (R4).
        keys: of each head of queries and keys, behind the rotary embedding; their products stay what they are (R3).
    """

    ffn: OnlineRotation | None = None
    keys: OnlineRotation | None = None

    def of_input(self, subset: Subset) -> OnlineRotation | None:
        """How a subset's shared input is rotated before it's read."""
        return self.ffn if subset.reads == "ffn" else None

    def cut(self, subset: Subset) -> Subset:
        """The subset as later steps see it: through a rotation no operation in front absorbs a scale."""
        return subset if self.of_input(subset) is None else replace(subset, prev=None)


class Algorithm:
    """Base of all methods.

    A *transform* leaves the float model's output unchanged; a *pruner* makes weights 0; a *quantizer* delivers codes
    and leaves 0 what a pruner before it has pruned.

    A transform that needs no data changes weights as they're loaded: it has ``embedding``, ``block`` and ``head``
    instead of ``subset``, and everything after it sees the model that it made. A new method is one file with a
    subclass, listed in ``registry.py``.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["transform", "pruner", "quantizer"]]
    options_type: ClassVar[type[Options]]
    statistics: frozenset[str] = frozenset()
    """Names of the fields of ``Statistics`` that it reads."""

    works_without_grid: ClassVar[bool] = False
    """Whether it may be named in a run that leaves the weights as they are."""

    works_on: ClassVar[frozenset[Space]] = frozenset({"residual", "heads", "ffn", "inner"})
    """The spaces whose readers it changes."""

    layers: tuple[str, ...] | None = None
    """The Linears that it's limited to; None: all."""

    folds: bool = True
    """Of a transform with data: whether it moves a scale into what is in front of a subset."""

    delivers: ClassVar[bool] = True
    """Of a quantizer: whether every Linear with a grid gets codes; else it only looks at them."""

    learns: ClassVar[bool] = False
    """Whether ``tune`` is to be called for each block before ``subset``. Only quantizers may."""

    clusters: ClassVar[bool] = False
    """Whether it makes clusters of channels, which reorder the block: all ``view.clusters`` of every subset."""

    def cluster_count(self, subset: Subset, heads: Heads) -> int:
        """At most how many clusters the input of a subset has."""
        raise NotImplementedError

    def needs(self, *, quant_out: bool | None) -> Needs:
        """What to ask of the engine, given ``quant_out`` (of a pruner: ``sparsity_out``); None: its own habit."""
        raise NotImplementedError

    def covers(self, subset: Subset) -> bool:
        """Whether it is given a subset: one that it works on and, if it's limited to some Linears, with one of them."""
        named = self.layers is None or any(is_named(linear, name) for name in self.layers for linear in subset.linears)
        return named and subset.reads in self.works_on

    def scatters_groups(self, spec: QuantSpec) -> bool:
        """Whether its groups aren't runs of consecutive columns, so that a checkpoint would need an index of them."""
        return False

    def check(self, key: str, scheme: Scheme) -> None:
        """Refuse a scheme that it can't do, before a weight is read.

        Args:
            key: of the section that has it, such as ``quant``.
            scheme: the grids of weights and inputs.

        Raises:
            ConfigError: names the key.
        """

    def subset(self, view: SubsetView) -> None:
        """Called once for each subset of each block, with its statistics ready. Behind ``tune`` there are none."""
        raise NotImplementedError

    def solve(self, views: Sequence[SubsetView]) -> None:
        """Called with subsets of equal shapes, each with statistics of its own: the experts of a mixture. A method that
        can do several at once does so here."""
        for view in views:
            self.subset(view)

    def tune(self, view: BlockView) -> TuneNote:
        """Learn clips, scales and shifts of a whole block; they are folded before ``subset`` is called."""
        raise NotImplementedError

    def embedding(self, weights: Mapping[str, Tensor], frame: Frame) -> dict[str, Tensor]:
        """What stands in front of the blocks, by the model's parameter names, changed; dtypes stay."""
        raise NotImplementedError

    def block(self, block: nn.Module, index: int, frame: Frame) -> None:
        """Change block ``index``, just loaded, in place."""
        raise NotImplementedError

    def head(self, weights: Mapping[str, Tensor], frame: Frame) -> dict[str, Tensor]:
        """What stands behind the blocks, changed; a head that is tied to the embedding is among it."""
        raise NotImplementedError

    def hidden(self, hidden: Tensor, frame: Frame) -> Tensor:
        """The hidden state ``[..., width]`` between two blocks of the changed model, given the original's."""
        raise NotImplementedError

    def online(self, frame: Frame) -> Online:
        """What must run with the changed model."""
        return Online()

    def warnings(self, frame: Frame) -> list[str]:
        """What the user should know before a weight is read."""
        return []
