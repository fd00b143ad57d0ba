"""The steps of a run, in order, and which weight gets which grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import BaseModel

from ..errors import ConfigError
from ..models import Heads, Subset
from ..quant import ActSpec, KvSpec, PerCluster, QuantSpec, Scheme, Sparsity
from .base import Algorithm, Frame, Needs, Online
from .clustering import check_clusters
from .layers import Ignored, Rule, first_scheme
from .registry import ALGORITHMS
from .rtn import RTN, RTNOptions


@dataclass(frozen=True)
class ExpertCalibration:
    """How the experts of a mixture are calibrated.

    Attributes:
        all_tokens: on all tokens, rather than on those that are routed to them.
        min_tokens: tokens below which an expert takes the statistics of all experts of its layer; None: an eighth of
            the Linear's input channels, below which a Gram matrix knows nothing of most directions.
    """

    all_tokens: bool = False
    min_tokens: int | None = None

    def enough(self, columns: int) -> int:
        """How many tokens are enough for a Linear with so many input channels."""
        return max(1, columns // 8) if self.min_tokens is None else self.min_tokens


@dataclass(frozen=True)
class Step:
    """One algorithm of the recipe with what it needs of the engine."""

    algorithm: Algorithm
    needs: Needs

    @property
    def at_load(self) -> bool:
        """Whether it is a transform that needs no data, which changes weights as they're loaded."""
        return self.algorithm.kind == "transform" and not self.needs.data


@dataclass(frozen=True)
class Recipe:
    """Transforms, then at most one pruner, then at most one weight quantizer.

    Attributes:
        steps: in order.
        spec: the grid of every quantized Linear that no rule is about; None: such Linears aren't quantized.
        ignored: Linears that are neither pruned nor quantized, nor are their inputs.
        seed: of every random choice.
        sparsity: how much of every Linear is pruned; None when nothing is.
        act: how the inputs of those Linears are quantized; None: they aren't.
        kv: how the KV cache of the compressed model is quantized; None if it isn't.
        rules: other schemes for some Linears; the first that means a Linear counts.
        drop_blocks: how many blocks of the least influence are left out.
        clustered: how tensors inside the blocks are quantized by a method that clusters channels; None: they aren't.
        observes: whether a format wants to know how large the transformed model's activations are.
        experts: how the experts of a mixture are calibrated.
        surveys: whether the losses of layers are measured before anything is compressed.
    """

    steps: tuple[Step, ...]
    spec: QuantSpec | None
    ignored: Ignored = field(default_factory=Ignored)
    seed: int = 0
    sparsity: Sparsity | None = None
    act: ActSpec | None = None
    kv: KvSpec | None = None
    rules: tuple[Rule, ...] = ()
    drop_blocks: int = 0
    clustered: ActSpec | None = None
    observes: bool = False
    experts: ExpertCalibration = field(default_factory=ExpertCalibration)
    surveys: bool = False

    @property
    def changes(self) -> bool:
        """Whether another model comes out than goes in."""
        return bool(self.steps) or self.drop_blocks > 0

    def scheme_of(self, block: int, name: str, full_name: str) -> Scheme:
        """The grids of a Linear and of its input."""
        if self.ignored.covers(block, name, full_name):
            return Scheme()
        return first_scheme(self.rules, block, name) or self.scheme

    def bound_scheme(self, scheme: Scheme, subset: Subset, heads: Heads) -> Scheme:
        """A Linear's scheme with what a method of clusters gives it: their number in its subset's input, and the grid
        of tensors inside the block. Others' schemes stay as they are."""
        if scheme.weight is None or not self.clusters:
            return scheme
        count = self.steps[-1].algorithm.cluster_count(subset, heads)
        return Scheme(replace(scheme.weight, granularity=PerCluster(count)), self.clustered)

    def spec_of(self, block: int, name: str, full_name: str) -> QuantSpec | None:
        """The grid of a Linear, or None."""
        return self.scheme_of(block, name, full_name).weight

    @property
    def scheme(self) -> Scheme:
        """That of every Linear that no rule is about."""
        return Scheme() if self.spec is None else Scheme(self.spec, self.act)

    @property
    def specs(self) -> tuple[QuantSpec, ...]:
        """All grids of weights, whether or not a Linear has them."""
        return tuple(scheme.weight for scheme in self._schemes if scheme.weight is not None)

    @property
    def acts(self) -> tuple[ActSpec, ...]:
        """All grids of inputs, whether or not a Linear has them."""
        return tuple(scheme.act for scheme in self._schemes if scheme.act is not None)

    @property
    def _schemes(self) -> tuple[Scheme, ...]:
        return (self.scheme, *(rule.scheme for rule in self.rules))

    def sparsity_of(self, block: int, name: str, full_name: str) -> Sparsity | None:
        """How much of a Linear is pruned, or None."""
        return None if self.ignored.covers(block, name, full_name) else self.sparsity

    @property
    def at_load(self) -> tuple[Algorithm, ...]:
        """The transforms that change weights as they're loaded."""
        return tuple(step.algorithm for step in self.steps if step.at_load)

    def online(self, frame: Frame | None) -> Online:
        """What must run with the model that those made; there is a frame where there are any."""
        found = () if frame is None else (algorithm.online(frame) for algorithm in self.at_load)
        return next((one for one in found if one != Online()), Online())

    @property
    def in_block(self) -> tuple[Step, ...]:
        """The steps after those."""
        return tuple(step for step in self.steps if not step.at_load)

    @property
    def clusters(self) -> bool:
        """Whether the quantizer makes clusters of channels, which reorder blocks."""
        return bool(self.steps) and self.steps[-1].algorithm.clusters

    @property
    def needs_data(self) -> bool:
        """Whether any step, a static KV cache or the survey of all blocks wants calibration tokens."""
        surveyed = self.calibrates_cache or self.drop_blocks > 0 or self.observes or self.surveys
        return surveyed or any(step.needs.data for step in self.steps)

    @property
    def calibrates_cache(self) -> bool:
        """Whether the ranges of the KV cache come from calibration text."""
        return self.kv is not None and self.kv.static

    @property
    def compressed_stream(self) -> bool:
        """Whether any step is calibrated on the compressed model's activations, as the KV cache is."""
        return self.calibrates_cache or any(step.needs.data and step.needs.compressed_stream for step in self.steps)

    @property
    def original_stream(self) -> bool:
        """Whether any step is calibrated on the original model's activations, or learns what it does with them."""
        reading = (step.needs for step in self.steps if step.needs.data)
        return self.observes or any(needs.targets or not needs.compressed_stream for needs in reading)


_ORDER = ("transform", "pruner", "quantizer")
_ONCE = {"pruner": ("pruners", "prune once"), "quantizer": ("weight quantizers", "weights are rounded once")}


def make_recipe(
    methods: Sequence[str],
    options: Mapping[str, BaseModel],
    spec: QuantSpec | None,
    ignored: Ignored,
    *,
    quant_out: bool | None,
    seed: int = 0,
    sparsity: Sparsity | None = None,
    sparsity_out: bool | None = None,
    act: ActSpec | None = None,
    kv: KvSpec | None = None,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Order the methods, add RTN where a grid is given and no quantizer named, and check that the order makes sense.

    Args:
        methods: names, in order.
        options: by name; defaults where there are none.
        spec: the grid; None where nothing is quantized, which only a pruner alone can do with.
        ignored: Linears left alone.
        quant_out: ``quant.quant_out``.
        sparsity: how much a pruner prunes.
        sparsity_out: ``sparse.sparsity_out``, a pruner's ``quant_out``.
        act: the grid of inputs.
        kv: how the KV cache is quantized.
        rules: other schemes for some Linears.

    Raises:
        ConfigError: two pruners or weight quantizers, a method behind one that must come later, a method named twice, a
            pruner without a sparsity, clusters that something doesn't go with, a scheme that a method can't do, or no
            grid for the weights, unless there is one for the KV cache and no method minds.
    """
    known = {algorithm.name: algorithm for algorithm in ALGORITHMS}
    if len(set(methods)) < len(methods):
        raise ConfigError(f"quant.method names a method twice: {list(methods)}", "name each once")
    chosen: list[Algorithm] = []
    for name in methods:
        kind = known[name]
        chosen.append(kind(options.get(name) or kind.options_type()))  # type: ignore[call-arg]
    _check_order(chosen)
    check_clusters(chosen, spec, act, kv, rules)
    kinds = [algorithm.kind for algorithm in chosen]
    schemes = [Scheme(spec, act if spec else None), *(rule.scheme for rule in rules)]
    rounding = any(scheme.weight is not None for scheme in schemes)
    if "quantizer" not in kinds and (rounding or kinds != ["pruner"]):
        chosen.append(RTN(RTNOptions()))
    needing = [a.name for a in chosen if not a.works_without_grid]
    if not rounding and chosen[-1].kind == "quantizer" and (kv is None or needing):
        raise ConfigError(
            "quant.weight is missing: no grid for the weights",
            f"add quant.weight.bit and its granularity{_or_rtn(needing) if kv is not None else ''}",
        )
    for algorithm in chosen:
        algorithm.check("quant", schemes[0])
        for rule in rules:
            algorithm.check(rule.key, rule.scheme)
    if sparsity is None and "pruner" in kinds:
        pruner = chosen[kinds.index("pruner")].name
        raise ConfigError(f"{pruner} prunes, but nothing says how much", "add sparse.weight.sparsity")
    outs = {"transform": quant_out, "pruner": sparsity_out, "quantizer": quant_out}
    needs = [a.needs(quant_out=outs[a.kind]) for a in chosen]
    ranged = any(scheme.act is not None and scheme.act.observer is not None for scheme in schemes)
    if ranged and not needs[-1].data:
        needs[-1] = range_needs(quant_out)
    steps = tuple(map(Step, chosen, needs))
    _check_loading(steps)
    recipe = Recipe(steps, spec, ignored, seed, sparsity if "pruner" in kinds else None, act, kv, tuple(rules))
    return replace(recipe, act=None, clustered=act) if recipe.clusters else recipe


def _or_rtn(needing: Sequence[str]) -> str:
    return f"; to quantize the KV cache alone, set quant.method to RTN instead of {', '.join(needing)}"


def range_needs(quant_out: bool | None) -> Needs:
    """What static activation ranges ask for where the quantizer asks for nothing.

    By default they are taken where they will be used: on the compressed model's activations, each subset's behind the
    compressed subsets before it. With ``quant_out: False`` they are those of the original model.
    """
    deployed = quant_out is not False
    return Needs(data=True, sequential=deployed, compressed_stream=deployed)


def _check_loading(steps: Sequence[Step]) -> None:
    """Refuse a transform that changes weights as they're loaded behind a step that needs them loaded."""
    ordered = sorted(steps, key=lambda step: not step.at_load)
    if ordered != list(steps):
        late = next(step for step, wanted in zip(ordered, steps, strict=True) if step is not wanted).algorithm.name
        raise ConfigError(
            f"quant.method: {late} must come first, since it changes the weights as they are loaded",
            f"write {[step.algorithm.name for step in ordered]}",
        )


def _check_order(chosen: Sequence[Algorithm]) -> None:
    """Refuse what isn't transforms, at most one pruner, at most one quantizer, and name the nearest list that is."""
    by_kind = {kind: [a.name for a in chosen if a.kind == kind] for kind in _ORDER}
    legal = [*by_kind["transform"], *by_kind["pruner"][:1], *by_kind["quantizer"][:1]]
    for kind, (several, why) in _ONCE.items():
        if len(by_kind[kind]) > 1:
            first, second = by_kind[kind][:2]
            raise ConfigError(
                f"quant.method has two {several}, {first} and {second}", f"{why}: keep one, as in {legal}"
            )
    if [a.name for a in chosen] == legal:
        return
    if by_kind["quantizer"] and chosen[-1].kind != "quantizer":
        raise ConfigError(
            f"quant.method: {by_kind['quantizer'][0]} must come last, since it rounds the weights", f"write {legal}"
        )
    raise ConfigError(
        f"quant.method: {by_kind['pruner'][0]} must come behind the transforms, which would change what it weighs",
        f"write {legal}",
    )
