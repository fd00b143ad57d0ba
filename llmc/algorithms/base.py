"""What an algorithm is, and all that it may touch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from ..linalg import OnlineRotation
from ..models import Heads, Residual, ScaleRule, Space, Subset, scale_rule
from ..quant import Accumulator, ActSpec, ClusterGrid, QuantSpec, QWeight, Sparsity
from .stats import AbsMax, AbsMean, ChannelRange, Gram, SequenceRange, SumSquares


class Options(BaseModel):
    """Base of the options of a method: the keys of ``quant.special`` in a YAML file. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _names(value: object) -> object:
    """A YAML list, or a name alone, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Layers = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(_names),
    Field(
        min_length=1,
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
class Statistics:
    """What was accumulated over the calibration tokens that a subset reads; None where nobody asked."""

    gram: Gram | None = None
    abs_mean: AbsMean | None = None
    abs_max: AbsMax | None = None
    channel_range: ChannelRange | None = None
    sum_squares: SumSquares | None = None
    sequence_range: SequenceRange | None = None
    ranges: Accumulator | None = None

    def update(self, inputs: Tensor) -> None:
        """Add tokens ``[..., in]``."""
        for statistic in (*self._of_channels(), self.ranges):
            if statistic is not None:
                statistic.update(inputs)

    @property
    def tokens(self) -> int:
        """Number of tokens seen."""
        return max((statistic.tokens for statistic in self._of_channels() if statistic is not None), default=0)

    def _of_channels(self) -> tuple[Gram | AbsMean | AbsMax | ChannelRange | SumSquares | SequenceRange | None, ...]:
        return self.gram, self.abs_mean, self.abs_max, self.channel_range, self.sum_squares, self.sequence_range


@dataclass(frozen=True)
class AttentionRanges:
    """What attention sees of a block, heads side by side: queries, scaled and behind a rotary embedding,
    ``[sequences, query heads * dim]``; keys and values ``[sequences, kv heads * dim]``."""

    query: SequenceRange = field(default_factory=SequenceRange)
    key: SequenceRange = field(default_factory=SequenceRange)
    value: SequenceRange = field(default_factory=SequenceRange)


@dataclass(frozen=True)
class ClipRatios:
    """By how much the min-max range of each row and group shrinks: ``lo`` and ``hi`` are ``[out, groups]`` in (0, 1].

    Ratios survive any later scaling of rows, which bounds wouldn't.
    """

    lo: Tensor
    hi: Tensor


class InspectCalls(Protocol):
    """The inspected module's calls on the calibration batches, ready to be repeated."""

    def __len__(self) -> int: ...

    def output(self, batch: int) -> Tensor:
        """Output of batch ``batch`` with the weights that the modules hold now."""
        ...


@dataclass
class LayerNote:
    """What the report says of one Linear.

    Attributes:
        error: relative error of its output by the step that delivered it.
        damp: damping that a factorization took.
        fallback: why it was treated by a simpler method.
        sparsity: fraction of its weights that were pruned; None if none were to be.
        pruning_error: ``error`` of the pruning, where a quantizer followed.
    """

    error: float = 0.0
    damp: float | None = None
    fallback: str | None = None
    sparsity: float | None = None
    pruning_error: float | None = None

    def behind(self, earlier: LayerNote | None) -> LayerNote:
        """This note of a quantizer with what the pruner before it had to say."""
        if earlier is None:
            return self
        fallback = "; ".join(text for text in (earlier.fallback, self.fallback) if text) or None
        return replace(self, fallback=fallback, sparsity=earlier.sparsity, pruning_error=earlier.error)


@dataclass
class SubsetView:
    """A subset with everything an algorithm may read or do. Weights change only through the methods.

    Attributes:
        subset: the declaration.
        linears: all Linears of the subset by their name in the block.
        specs: the grid of each Linear that is to be quantized; those left alone aren't in it.
        prev: the module that can absorb a scale, or None.
        heads: attention geometry.
        stats: accumulated statistics.
        calls: the inspected module's calls.
        clips: ranges that an earlier step found, by Linear; a later step starts from them.
        sparsity: how much of each Linear a pruner is to prune; those left alone aren't in it.
        pruned: masks ``[out, in]`` of the weights that a pruner made 0, by Linear; a quantizer must leave them 0.
        weights: results of a pruner, by Linear.
        quantized: results of a quantizer, by Linear.
        notes: what the report says, by Linear.
        act: how the shared input is quantized, or None.
        unrounded: quantized Linears that read it as it comes, though others don't.
        clustered: how tensors inside the block are quantized by clusters of channels, or None.
        attention: ranges in the block's attention, where tensors inside it are quantized by clusters.
        clusters: results of a method that clusters channels: ``input``, and of attention ``query``, ``key``, ``value``.
        scale: the input scale that was chosen for folding into ``prev``.
        shift: the input shift that was chosen for folding.
    """

    subset: Subset
    linears: Mapping[str, nn.Linear]
    specs: Mapping[str, QuantSpec]
    prev: nn.Module | None
    heads: Heads
    stats: Statistics
    calls: InspectCalls | None
    clips: dict[str, ClipRatios]
    sparsity: Mapping[str, Sparsity] = field(default_factory=dict)
    pruned: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    quantized: dict[str, QWeight] = field(default_factory=dict)
    notes: dict[str, LayerNote] = field(default_factory=dict)
    act: ActSpec | None = None
    unrounded: frozenset[str] = frozenset()
    clustered: ActSpec | None = None
    attention: AttentionRanges | None = None
    clusters: dict[str, ClusterGrid] = field(default_factory=dict)
    scale: tuple[Tensor, ScaleRule] | None = None
    shift: Tensor | None = None

    @property
    def columns(self) -> int:
        """Input channels."""
        return next(iter(self.linears.values())).weight.shape[1]

    def scale_rule(self, *, allow_gqa: bool) -> ScaleRule | None:
        """How ``prev`` could absorb a scale of the shared input; None if it can't."""
        if self.prev is None:
            return None
        return scale_rule(self.subset, self.prev, self.columns, self.heads, allow_gqa=allow_gqa)

    @property
    def fed_by_norm(self) -> bool:
        """Whether ``prev`` is a norm: it has one weight for each channel."""
        return self.prev is not None and isinstance(self.prev.weight, Tensor) and self.prev.weight.dim() == 1

    @property
    def can_shift(self) -> bool:
        """Whether ``prev`` and all Linears have biases, which can absorb a shift of the shared input."""
        modules = [self.prev, *self.linears.values()]
        return all(isinstance(getattr(module, "bias", None), nn.Parameter) for module in modules)

    def fold_scale(self, scale: Tensor, rule: ScaleRule) -> None:
        """Ask for ``prev /= scale`` and ``W *= scale``; done when all subsets of the block have been seen."""
        self.scale = (scale, rule)

    def fold_shift(self, shift: Tensor) -> None:
        """Ask for ``prev - shift`` and ``bias + W shift``, before the scale is folded."""
        self.shift = shift

    def put(self, name: str, weight: QWeight, note: LayerNote) -> None:
        """Deliver the quantized weight of a Linear."""
        self.quantized[name] = weight
        self.notes[name] = note

    def prune(self, name: str, weight: Tensor, mask: Tensor, note: LayerNote) -> None:
        """Deliver the weight ``[out, in]`` of a Linear without what ``mask`` (bool, ``[out, in]``) covers."""
        self.weights[name] = weight.masked_fill(mask, 0)
        self.pruned[name] = mask
        self.notes[name] = replace(note, sparsity=float(mask.sum()) / mask.numel())

    @contextmanager
    def trial(self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Within the context the named Linears hold these weights ``[out, in]`` and biases ``[out]``."""
        parameters = [(self.linears[name].weight, weight) for name, weight in weights.items()]
        parameters += [(self.linears[name].bias, bias) for name, bias in (biases or {}).items()]
        kept = [parameter.data for parameter, _ in parameters]
        try:
            for parameter, tensor in parameters:
                parameter.data = tensor.to(parameter.dtype)
            yield
        finally:
            for (parameter, _), data in zip(parameters, kept, strict=True):
                parameter.data = data


class BlockCalls(Protocol):
    """A block's calls on the calibration batches, for a method that learns.

    Whoever wants gradients asks for them (``torch.enable_grad``); the engine computes without.
    """

    def __len__(self) -> int: ...

    def output(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Output of batch ``batch`` with these weights in place of the block's own, by name, and with inputs rounded as
        the compressed block will round them. Gradients reach the weights, straight through the rounding."""
        ...

    def plain(self, batch: int) -> Tensor:
        """Output of the block as it is, on the same inputs, not rounded."""
        ...

    def target(self, batch: int) -> Tensor:
        """Output of the original model's block on the original model's inputs."""
        ...


@dataclass(frozen=True)
class BlockView:
    """A whole block, for a method that learns scales and clips. It leaves them in the views of the subsets.

    Attributes:
        subsets: views of all subsets, in execution order, with statistics of the inputs that the calls have.
        weights: the block's parameters by name, as they are.
        calls: the block's calls.
        transformed: whether a step before has chosen scales from data: there is nothing to guess.
    """

    subsets: Sequence[SubsetView]
    weights: Mapping[str, Tensor]
    calls: BlockCalls
    transformed: bool


@dataclass(frozen=True)
class TuneNote:
    """What the report says of a block that was learned.

    Attributes:
        start: loss over all batches before the first step.
        end: the same with what was kept.
        epoch: the epoch that was kept; 0: nothing was better than the start.
        stopped: why learning ended early.
    """

    start: float
    end: float
    epoch: int
    stopped: str | None = None


@dataclass(frozen=True)
class Frame:
    """What a transform that needs no data may know of the whole model.

    Attributes:
        subsets: those of every block.
        heads: attention geometry.
        residual: who writes and reads the residual outside of the blocks.
        width: channels of the residual.
        seed: ``base.seed``, of every random choice.
        ffn: channels between the feed-forward's Linears; 0 where blocks differ.
    """

    subsets: tuple[Subset, ...]
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
    statistics: ClassVar[frozenset[str]] = frozenset()
    """Names of the fields of ``Statistics`` that it reads."""

    works_without_grid: ClassVar[bool] = False
    """Whether it may be named in a run that leaves the weights as they are."""

    works_on: ClassVar[frozenset[Space]] = frozenset({"residual", "heads", "ffn"})
    """The spaces whose readers it changes."""

    layers: tuple[str, ...] | None = None
    """The Linears that it's limited to; None: all."""

    folds: bool = True
    """Of a transform with data: whether it moves a scale into what is in front of a subset."""

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

    def check(self, spec: QuantSpec | None, act: ActSpec | None) -> None:
        """Refuse a scheme that it can't do, before a weight is read.

        Raises:
            ConfigError: names the key.
        """

    def subset(self, view: SubsetView) -> None:
        """Called once for each subset of each block, with its statistics ready. Behind ``tune`` there are none."""
        raise NotImplementedError

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


def new_statistics(
    wanted: Sequence[str] | frozenset[str], columns: int, device: torch.device, act: ActSpec | None = None
) -> Statistics:
    """Empty statistics of the wanted kinds, and of what ``act`` has to know of its inputs."""
    return Statistics(
        gram=Gram(columns, device) if "gram" in wanted else None,
        abs_mean=AbsMean(columns, device) if "abs_mean" in wanted else None,
        sum_squares=SumSquares(columns, device) if "sum_squares" in wanted else None,
        ranges=None if act is None or act.observer is None else act.observer.accumulator(act.grid),
        sequence_range=SequenceRange() if "sequence_range" in wanted else None,
        abs_max=AbsMax(columns, device) if "abs_max" in wanted else None,
        channel_range=ChannelRange(columns, device) if "channel_range" in wanted else None,
    )
