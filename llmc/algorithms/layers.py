"""Which Linears are meant: those left alone, and those with a scheme of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..quant import Scheme
from .base import is_named


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
            return self.covers_block(block)
        in_blocks = self.blocks is None or block in self.blocks
        return in_blocks and any(is_named(name, layer) for layer in self.layers)

    def covers_block(self, block: int) -> bool:
        """Whether a whole block is left alone."""
        return not self.layers and self.blocks is not None and block in self.blocks


@dataclass(frozen=True)
class LayerPattern:
    """Linears by a name inside the block, or the end of one; ``*`` stands for anything.

    Attributes:
        text: as the configuration has it.
        name: such as ``down_proj``, ``mlp.down_proj`` or ``mlp.experts.*.down_proj``.
        blocks: in which blocks; None: in all.
    """

    text: str
    name: str
    blocks: frozenset[int] | None = None

    def covers(self, block: int, name: str) -> bool:
        """Whether the Linear ``name`` of block ``block`` is meant."""
        return (self.blocks is None or block in self.blocks) and self.names(name)

    def names(self, name: str) -> bool:
        """The same, whatever the block."""
        return fnmatchcase(name, self.name) or fnmatchcase(name, f"*.{self.name}")


@dataclass(frozen=True)
class Rule:
    """Another scheme for some Linears.

    Attributes:
        key: where it stands in the configuration.
        patterns: which Linears.
        scheme: theirs; an empty one leaves them as they are.
    """

    key: str
    patterns: tuple[LayerPattern, ...]
    scheme: Scheme

    def covers(self, block: int, name: str) -> bool:
        """Whether the Linear ``name`` of block ``block`` is meant."""
        return any(pattern.covers(block, name) for pattern in self.patterns)


def first_scheme(rules: Iterable[Rule], block: int, name: str) -> Scheme | None:
    """That of the first rule that means the Linear; None if none does."""
    return next((rule.scheme for rule in rules if rule.covers(block, name)), None)
