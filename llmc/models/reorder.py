"""Function-preserving reorderings of channels inside a block (RPTQ, Yuan et al. 2023, section 4.2 and figure 3).

The residual is never reordered. A norm writes its output in another order (R1, R4), the one gather there is; its
readers' columns follow. Queries and keys (R2), values (R3) and the feed-forward's hidden channels (R5) are reordered by
the rows of who writes them, and the columns of who reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ModelError
from .adapter import Heads, Subset


@dataclass(frozen=True)
class Orders:
    """New orders of channels: int64, the old channel at each new place.

    Attributes:
        inputs: of each subset's input, by its key; of one that reads the heads, that of the value channels
            ``[kv heads * dim]``, which all query heads of a value head follow. Channels stay in their head.
        keys: of the key channels ``[kv heads * dim]``, which the queries follow; None keeps them.
    """

    inputs: Mapping[str, Tensor]
    keys: Tensor | None = None


@dataclass(frozen=True)
class Moves:
    """What a reordering does to the weights ``[out, in]`` of Linears, by their names: the old row or column at each new
    place. By a norm's name, the gather of its output."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)


def check_reorderable(subsets: Sequence[Subset]) -> None:
    """Refuse a block whose tensors can't be reordered.

    Raises:
        ModelError: says why.
    """
    bare = any(subset.prev is None for subset in subsets if subset.reads == "residual")
    spaces = sorted((subset.reads, str(subset.writes)) for subset in subsets)
    if bare:
        reason = "its norms stand behind each branch, so that nothing in front of it could write in another order"
    elif any(subset.rows is not None for subset in subsets):
        reason = "one of its Linears makes several tensors, each of which would need an order of its own"
    elif spaces != [("ffn", "residual"), ("heads", "residual"), ("residual", "ffn"), ("residual", "heads")]:
        reason = "it isn't one attention and one feed-forward part, each behind a norm"
    else:
        return
    raise ModelError(f"the channels inside a block of this model can't be reordered: {reason}", "use another method")


def over_query_heads(order: Tensor, heads: Heads) -> Tensor:
    """The order of query channels ``[query heads * dim]`` that follows from one of key or value channels."""
    inside = order.reshape(heads.kv, heads.dim) - torch.arange(heads.kv)[:, None] * heads.dim
    repeated = inside.repeat_interleave(heads.query // heads.kv, dim=0)
    return (repeated + torch.arange(heads.query)[:, None] * heads.dim).flatten()


def plan_moves(subsets: Sequence[Subset], heads: Heads, orders: Orders) -> Moves:
    """What the orders mean for the Linears and norms of a block that ``check_reorderable`` lets pass."""
    moves = Moves()
    for subset in subsets:
        order = orders.inputs[subset.key]
        columns = over_query_heads(order, heads) if subset.reads == "heads" else order
        moves.columns.update(dict.fromkeys(subset.linears, columns))
        if subset.reads == "residual":
            moves.norms[str(subset.prev)] = order
        elif subset.reads == "heads":
            moves.rows[str(subset.prev)] = order
        else:
            writers = (name for other in subsets if other.writes == "ffn" for name in other.linears)
            moves.rows.update(dict.fromkeys(writers, order))
        if subset.writes == "heads" and orders.keys is not None:
            if not subset.orderable:
                raise ValueError("the channels of queries and keys can't be reordered behind a rotary embedding")
            query, key, _ = subset.linears
            moves.rows.update({query: over_query_heads(orders.keys, heads), key: orders.keys})
    return moves


@torch.no_grad()
def reorder_block(block: nn.Module, moves: Moves) -> list[RemovableHandle]:
    """Reorder a block's weights in place and let its norms write in their new order.

    Returns:
        The norms' hooks.
    """
    for name in moves.rows.keys() | moves.columns.keys():
        linear = block.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is a {type(linear).__name__}, not a Linear")
        device = linear.weight.device
        if name in moves.rows:
            rows = moves.rows[name].to(device)
            linear.weight.data = linear.weight.data[rows]
            if isinstance(linear.bias, Tensor):
                linear.bias.data = linear.bias.data[rows]
        if name in moves.columns:
            linear.weight.data = linear.weight.data[:, moves.columns[name].to(device)]
    return gather_norms(block, moves)


def gather_norms(block: nn.Module, moves: Moves) -> list[RemovableHandle]:
    """Let the norms of a block write in their new order, by hooks."""

    def gather(order: Tensor, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.index_select(-1, order.to(output.device))

    return [
        block.get_submodule(name).register_forward_hook(partial(gather, order)) for name, order in moves.norms.items()
    ]
