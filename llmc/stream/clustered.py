"""Tensors inside a block on grids of clusters: watched while the block is calibrated, rounded from then on.

The block is reordered so that each cluster is a run of channels, as a kernel would have it. Behind a rotary embedding,
queries and keys stay in the model's order: a head that changed the order of its pairs of channels would need the
embedding's frequencies in that order, head by head, which Transformers' modules can't have. A kernel can; the numbers
are the same, since a grid belongs to channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface

from ..algorithms import AttentionRanges
from ..models import Heads, Moves, Orders, Subset, gather_norms, over_query_heads, plan_moves, reorder_block
from ..quant import ClusterGrid, ClusterQuantizer, QWeight

_QUERIES = 512  # of a window that are attended at once
_PROBABILITIES = 255  # steps of attention probabilities: 8 bits from 0 to 1
_functions: Any = AttentionInterface  # without annotations


class ClusteredBlock:
    """What a method of clusters does to one block, until ``remove``.

    Args:
        block: the module.
        subsets: its subsets, which ``check_reorderable`` lets pass.
        heads: attention geometry.
        attends: whether tensors of the attention are quantized.
        device: of the activations.
    """

    def __init__(
        self, block: nn.Module, subsets: Sequence[Subset], heads: Heads, device: torch.device, *, attends: bool
    ) -> None:
        self._block, self._subsets, self._heads, self._device = block, subsets, heads, device
        self._attends = attends
        self._hooks: list[RemovableHandle] = []
        self._attention: dict[str, ClusterQuantizer] = {}
        self.watched: AttentionRanges | None = None
        self.grids: dict[str, ClusterGrid] = {}
        self.moves = Moves()

    # --- calibration -------------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context the block's attention is watched, for ``ranges``."""
        self.watched = AttentionRanges() if self._attends else None
        try:
            yield
        finally:
            self.watched = None

    def take(self, subset: Subset, found: Mapping[str, ClusterGrid]) -> None:
        """Keep what a method found for a subset: the grid of its ``input``, and those of the attention's tensors."""
        self.grids |= {subset.key if name == "input" else name: grid for name, grid in found.items()}

    def reorder(self, quantized: Mapping[str, QWeight]) -> dict[str, QWeight]:
        """Reorder the block by all grids taken and round from now on.

        Returns:
            The block's quantized weights as far as a checkpoint can express their order.
        """
        self.switch_on(self.grids, reorder=True)
        gathered, rows = self.gathered, self.moves.rows
        columns = {name: order for name, order in self.moves.columns.items() if name not in gathered}
        return {name: weight.reordered(rows.get(name), columns.get(name)) for name, weight in quantized.items()}

    @property
    def plain(self) -> dict[str, dict[str, Any]]:
        """The grids as plain values, for the journal."""
        return {name: asdict(grid) for name, grid in self.grids.items()}

    def restore(self, plain: Mapping[str, Mapping[str, Any]]) -> None:
        """Round by the grids that ``plain`` returned in an earlier run; weights are loaded behind it."""
        self.switch_on({name: ClusterGrid.from_plain(grid) for name, grid in plain.items()}, reorder=False)

    # --- rounding ----------------------------------------------------------------------------------------------------

    def switch_on(self, grids: Mapping[str, ClusterGrid], *, reorder: bool) -> None:
        """Round from now on.

        Args:
            grids: of each subset's input by its key, of ``value``, and ``query`` and ``key`` if there are any.
            reorder: reorder the weights, too; otherwise they already are, or will be loaded in the new order.
        """
        self.grids = dict(grids)
        attention = next(subset for subset in self._subsets if subset.writes == "heads")
        keys = grids["key"].order if attention.orderable and "key" in grids else None
        values = grids["value"].order
        inputs = {s.key: values if s.reads == "heads" else grids[s.key].order for s in self._subsets}
        orders = Orders(inputs, keys)
        self.moves = plan_moves(self._subsets, self._heads, orders)
        self._hooks += reorder_block(self._block, self.moves) if reorder else gather_norms(self._block, self.moves)
        for subset in self._subsets:
            if grids[subset.key].bits is not None:
                order = self.moves.columns[subset.linears[0]]
                self._round_input(subset, ClusterQuantizer(grids[subset.key], self._device, order))
        queries = None if keys is None else over_query_heads(keys, self._heads)
        for name, places in (("query", queries), ("key", keys), ("value", values)):
            if name in grids and grids[name].bits is not None:
                self._attention[name] = ClusterQuantizer(grids[name], self._device, places)

    def _round_input(self, subset: Subset, quantizer: ClusterQuantizer) -> None:
        """Round in the norm, behind its gather, or else in front of the Linears."""
        if subset.reads == "residual":
            norm = self._block.get_submodule(str(subset.prev))
            self._hooks.append(norm.register_forward_hook(partial(_round_output, quantizer)))
        else:
            linears = map(self._block.get_submodule, subset.linears)
            self._hooks += [linear.register_forward_pre_hook(partial(_round_first, quantizer)) for linear in linears]

    @property
    def gathered(self) -> dict[str, Tensor]:
        """By a Linear's name, the order of its columns in memory where the checkpoint has the norm's own: a checkpoint
        can't say that a norm writes in another order."""
        readers = [subset for subset in self._subsets if subset.reads == "residual"] if self.moves.columns else []
        return {name: self.moves.columns[name] for subset in readers for name in subset.linears}

    @property
    def on(self) -> bool:
        """Whether it watches or rounds anything in the attention."""
        return self.watched is not None or bool(self._attention)

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    # --- attention ---------------------------------------------------------------------------------------------------

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention of a whole window, to be registered with Transformers (see ``attention.attending``)."""
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self.watched is not None:
            watched = self.watched
            for states, seen in ((query * scaling, watched.query), (key, watched.key), (value, watched.value)):
                seen.update(states.transpose(1, 2).flatten(2))
        key, value = self._rounded("key", key), self._rounded("value", value)
        if "query" not in self._attention:
            result: Tensor = _functions()["sdpa"](module, query, key, value, mask, **options)[0]
            return result, None
        return _with_rounded_probabilities(self._rounded("query", query * scaling), key, value, mask), None

    def _rounded(self, name: str, states: Tensor) -> Tensor:
        """``[batch, heads, tokens, dim]`` rounded."""
        if name not in self._attention:
            return states
        side_by_side = states.transpose(1, 2)
        return self._attention[name](side_by_side.flatten(2)).reshape(side_by_side.shape).transpose(1, 2)


def _with_rounded_probabilities(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention ``[batch, tokens, heads, dim]`` of scaled queries; probabilities are ``round(255 p) / 255``."""
    repeat, count = query.shape[1] // key.shape[1], key.shape[2]
    keys, values = (states.repeat_interleave(repeat, dim=1) for states in (key, value))
    positions, parts = torch.arange(count, device=query.device), []
    for start in range(0, query.shape[2], _QUERIES):
        rows = slice(start, start + _QUERIES)
        scores = query[:, :, rows] @ keys.transpose(-1, -2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        part = positions[rows, None] >= positions if mask is None else mask[:, :, rows, :count]
        scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        probabilities = (scores.softmax(-1) * _PROBABILITIES).round_().div_(_PROBABILITIES)
        parts.append(probabilities.to(values.dtype) @ values)
    return torch.cat(parts, dim=2).transpose(1, 2)


def _round_output(quantizer: ClusterQuantizer, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return quantizer(output)


def _round_first(quantizer: ClusterQuantizer, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (quantizer(args[0]), *args[1:])
