"""The steps of a run, in order, and which weight gets which grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from ..errors import ConfigError
from ..quant import KvSpec, QuantSpec
from .base import Algorithm, Needs
from .registry import ALGORITHMS
from .rtn import RTN, RTNOptions


@dataclass(frozen=True)
class Ignored:
    """Linears left in full precision: by name inside the block, in all blocks or in some, or by full name."""

    layers: frozenset[str] = frozenset()
    blocks: frozenset[int] | None = None
    full_names: frozenset[str] = frozenset()

    @property
    def asked(self) -> bool:
        """Whether anything is to be ignored."""
        return bool(self.layers or self.blocks or self.full_names)

    def covers(self, block: int, name: str, full_name: str) -> bool:
        """Whether the Linear ``name`` of block ``block`` is left alone."""
        if full_name in self.full_names:
            return True
        if not self.layers:
            return self.blocks is not None and block in self.blocks
        in_blocks = self.blocks is None or block in self.blocks
        return in_blocks and any(name == layer or name.endswith(f".{layer}") for layer in self.layers)


@dataclass(frozen=True)
class Step:
    """One algorithm of the recipe with what it needs of the engine."""

    algorithm: Algorithm
    needs: Needs


@dataclass(frozen=True)
class Recipe:
    """Transforms, then one weight quantizer.

    Attributes:
        steps: in order.
        spec: the grid of every quantized Linear; None when nothing is quantized.
        ignored: Linears that keep their weights.
        kv: how the KV cache of the compressed model is quantized; None if it isn't.
    """

    steps: tuple[Step, ...]
    spec: QuantSpec | None
    ignored: Ignored = field(default_factory=Ignored)
    kv: KvSpec | None = None

    def spec_of(self, block: int, name: str, full_name: str) -> QuantSpec | None:
        """The grid of a Linear, or None."""
        return None if self.ignored.covers(block, name, full_name) else self.spec

    @property
    def needs_data(self) -> bool:
        """Whether any step, or a static KV cache, wants calibration tokens."""
        return self.calibrates_cache or any(step.needs.data for step in self.steps)

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
        """Whether any step is calibrated on the original model's activations."""
        return any(step.needs.data and not step.needs.compressed_stream for step in self.steps)


def make_recipe(
    methods: Sequence[str],
    options: Mapping[str, BaseModel],
    spec: QuantSpec | None,
    ignored: Ignored,
    *,
    quant_out: bool | None,
    kv: KvSpec | None = None,
) -> Recipe:
    """Order the methods, add RTN where no quantizer is named, and check that the order makes sense.

    Raises:
        ConfigError: two weight quantizers, a transform behind the quantizer, a method named twice, or no grid for the
            weights, unless there is one for the KV cache and no method minds.
    """
    known = {algorithm.name: algorithm for algorithm in ALGORITHMS}
    if len(set(methods)) < len(methods):
        raise ConfigError(f"quant.method names a method twice: {list(methods)}", "name each once")
    chosen: list[Algorithm] = []
    for name in methods:
        kind = known[name]
        chosen.append(kind(options.get(name) or kind.options_type()))  # type: ignore[call-arg]
    quantizers = [a.name for a in chosen if a.kind == "quantizer"]
    if len(quantizers) > 1:
        legal = [a.name for a in chosen if a.kind == "transform"] + quantizers[:1]
        raise ConfigError(
            f"quant.method has two weight quantizers, {quantizers[0]} and {quantizers[1]}",
            f"weights are rounded once: keep one, as in {legal}",
        )
    if not quantizers:
        chosen.append(RTN(RTNOptions()))
    elif chosen[-1].kind != "quantizer":
        legal = [a.name for a in chosen if a.kind == "transform"] + quantizers
        raise ConfigError(
            f"quant.method: {quantizers[0]} must come last, since it rounds the weights", f"write {legal}"
        )
    needing = [a.name for a in chosen if not a.works_without_grid]
    if spec is None and (kv is None or needing):
        raise ConfigError(
            "quant.weight is missing: no grid for the weights",
            f"add quant.weight.bit and its granularity{_or_rtn(needing) if kv is not None else ''}",
        )
    return Recipe(tuple(Step(a, a.needs(quant_out=quant_out)) for a in chosen), spec, ignored, kv)


def _or_rtn(needing: Sequence[str]) -> str:
    return f"; to quantize the KV cache alone, set quant.method to RTN instead of {', '.join(needing)}"
