"""A model with fewer blocks: which stay, and what their tensors and its configuration are called then."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PER_BLOCK = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
)  # keys of config.json that list something of every block


@dataclass(frozen=True)
class BlockSelection:
    """The blocks that stay, in their order and numbered anew.

    Attributes:
        count: blocks of the original model.
        path: dotted path of the list of blocks, such as ``model.layers``.
        dropped: numbers of those that don't stay.
        stored: the same path in the checkpoint; None: whatever ends like it.
    """

    count: int
    path: str
    dropped: frozenset[int] = frozenset()
    stored: str | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of those that stay."""
        return tuple(index for index in range(self.count) if index not in self.dropped)

    def keeps(self, name: str) -> bool:
        """Whether a tensor or module of the checkpoint stays: it isn't of a dropped block."""
        found = self._number(name)
        return found is None or int(found[1]) not in self.dropped

    def renamed(self, name: str) -> str:
        """The name in the smaller model of a tensor or module that stays."""
        kept = self.kept
        return self._with(name, {old: new for new, old in enumerate(kept)})

    def original(self, name: str) -> str:
        """The inverse."""
        return self._with(name, dict(enumerate(self.kept)))

    def config(self, content: Mapping[str, Any], model: Any) -> dict[str, Any]:
        """``config.json`` of the smaller model.

        Args:
            content: that of the original.
            model: the same as Transformers reads it (of a nested one, the text model's), which knows what it left out.
        """
        if not self.dropped:
            return dict(content)
        known = model.to_dict()
        name = model.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        count = name if name in known else "num_layers"  # ChatGLM's
        changed: dict[str, Any] = {count: len(self.kept)}
        for key in _PER_BLOCK:
            if isinstance(known.get(key), list | tuple):
                changed[key] = [known[key][index] for index in self.kept]
        if (first := known.get("max_window_layers")) is not None:  # Qwen: blocks in front of it attend to everything
            changed["max_window_layers"] = sum(index < first for index in self.kept)
        inner = content.get("text_config")
        return (
            {**content, "text_config": {**inner, **changed}} if isinstance(inner, Mapping) else {**content, **changed}
        )

    def _number(self, name: str) -> re.Match[str] | None:
        if self.stored is None:
            return re.search(rf"(?:^|\.){re.escape(self.path.rpartition('.')[2])}\.(\d+)(?=\.)", name)
        # An encoder in front of the blocks has layers of its own.
        return re.match(rf"(?:{re.escape(self.stored)}|{re.escape(self.path)})\.(\d+)(?=\.)", name)

    def _with(self, name: str, numbers: Mapping[int, int]) -> str:
        found = self._number(name)
        if found is None:
            return name
        return f"{name[: found.start(1)]}{numbers[int(found[1])]}{name[found.end(1) :]}"
