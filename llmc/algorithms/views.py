"""What an algorithm gets to see of a block, and where it leaves its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

from ..models import Heads, ScaleRule, Subset, scale_rule
from ..models.experts import HostMemory
from ..quant import ActSpec, ClusterGrid, QuantSpec, QWeight, Sparsity
from .stats import AttentionRanges, Statistics


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
        tokens: of an expert's, how many calibration tokens it was shown; None where nobody counted.
        wanted: of an expert's that was shown fewer than these, and was solved with those of all experts of its layer.
        trials: where schemes are only compared, the error with each of them.
    """

    error: float = 0.0
    damp: float | None = None
    fallback: str | None = None
    sparsity: float | None = None
    pruning_error: float | None = None
    tokens: int | None = None
    wanted: int | None = None
    trials: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the journal; what a pruner or a mixture tells only where there is one."""
        plain: dict[str, Any] = {"error": self.error, "damp": self.damp, "fallback": self.fallback}
        if self.sparsity is not None:
            plain |= {"sparsity": self.sparsity, "pruning_error": self.pruning_error}
        if self.tokens is not None:
            plain |= {"tokens": self.tokens, "wanted": self.wanted}
        if self.trials is not None:
            plain |= {"trials": list(self.trials)}
        return plain

    def behind(self, earlier: LayerNote | None) -> LayerNote:
        """This note of a quantizer with what the pruner before it had to say."""
        if earlier is None:
            return self
        fallback = "; ".join(text for text in (earlier.fallback, self.fallback) if text) or None
        counted = earlier if self.tokens is None else self
        return replace(
            self,
            fallback=fallback,
            sparsity=earlier.sparsity,
            pruning_error=earlier.error,
            tokens=counted.tokens,
            wanted=counted.wanted,
        )


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
        home: where the weights of experts are while nobody needs them; None: with the tokens.
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
    home: HostMemory | None = None

    @property
    def columns(self) -> int:
        """Input channels."""
        return next(iter(self.linears.values())).weight.shape[1]

    def weight(self, name: str) -> Tensor:
        """The weight ``[out, in]`` of a Linear, float32 and where the tokens are. It may be the Linear's own."""
        return self._here(self.linears[name].weight.detach()).float()

    def bias(self, name: str) -> Tensor | None:
        """The bias ``[out]`` of a Linear likewise, if it has one."""
        bias: Tensor | None = self.linears[name].bias
        return None if bias is None else self._here(bias.detach()).float()

    def release(self) -> None:
        """Let go of what it was made from and what it delivered, but for what is to be folded."""
        self.stats, self.calls, self.weights, self.quantized = Statistics(), None, {}, {}

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor if self.home is None else self.home.here(tensor)

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
        whole = not self.subset.also and self.subset.rows is None
        return whole and all(isinstance(getattr(module, "bias", None), nn.Parameter) for module in modules)

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
    def trial(self, make: Callable[[str], tuple[Tensor, Tensor | None]]) -> Iterator[None]:
        """Within the context the Linears with a grid hold other weights.

        Args:
            make: by the name of a Linear, its weight ``[out, in]``, and its bias ``[out]`` if that changes too. It is
                asked for one after the other: what takes the place of a weight in the host's memory goes there at once.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            for name in self.specs:
                linear = self.linears[name]
                weight, bias = make(name)
                for parameter, tensor in ((linear.weight, weight), (linear.bias, bias)):
                    if tensor is not None:
                        kept.append((parameter, parameter.data))
                        parameter.data = self._in_place_of(parameter.data, tensor)
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data

    def _in_place_of(self, data: Tensor, tensor: Tensor) -> Tensor:
        changed = tensor.to(data.dtype)
        return changed if self.home is None or not self.home.holds(data) else self.home.store(changed)


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
