"""Function-preserving changes: a scale moves from the input of a subset into the operation that produced it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapter import Heads, Subset


@dataclass(frozen=True)
class ScaleRule:
    """How the input channels of a subset map onto the output channels of its ``prev``.

    Attributes:
        repeat: query heads for each key-value head where the subset reads the attention's output; 1 elsewhere.
        head_dim: channels of a head; 0 where ``repeat`` is 1.
        rows: ranges of ``prev``'s rows that make the input; None: all of them.
        offset: what ``prev`` adds to its weight before it multiplies by it.
    """

    repeat: int = 1
    head_dim: int = 0
    rows: tuple[tuple[int, int], ...] | None = None
    offset: float = 0.0

    def tie(self, scale: Tensor) -> Tensor:
        """Make a scale ``[in]`` equal for all query heads that read one value head (their geometric mean)."""
        if self.repeat == 1:
            return scale
        by_head = scale.reshape(-1, self.repeat, self.head_dim)
        return by_head.log().mean(1, keepdim=True).exp().expand_as(by_head).reshape(-1)

    def to_prev(self, scale: Tensor) -> Tensor:
        """The scale of ``prev``'s output channels: one for each key-value channel."""
        if self.repeat == 1:
            return scale
        return scale.reshape(-1, self.repeat, self.head_dim)[:, 0].reshape(-1)

    def over_rows(self, factor: Tensor, count: int) -> Tensor:
        """A factor of the channels that ``prev`` makes of the input, as one for each of its ``count`` rows: 1 for those
        that make something else."""
        if self.rows is None:
            return factor
        return torch.ones(count, dtype=factor.dtype, device=factor.device).index_put((self.places(factor),), factor)

    def places(self, like: Tensor) -> Tensor:
        """Numbers of the rows that make the input, int64, on a tensor's device."""
        ranges = [torch.arange(start, stop, device=like.device) for start, stop in self.rows or ()]
        return torch.cat(ranges)

    def to_inputs(self, scale: Tensor) -> Tensor:
        """The inverse of ``to_prev``: a scale of ``prev``'s outputs as seen by the inputs ``[in]``."""
        if self.repeat == 1:
            return scale
        by_head = scale.reshape(-1, 1, self.head_dim)
        return by_head.expand(-1, self.repeat, -1).reshape(-1)


def scale_rule(subset: Subset, prev: nn.Module, columns: int, heads: Heads, *, allow_gqa: bool) -> ScaleRule | None:
    """How ``prev`` absorbs a scale of the subset's ``columns`` input channels; None if it can't."""
    outputs = prev.weight.shape[0] if isinstance(prev.weight, Tensor) else 0
    if subset.rows is not None:
        outputs = sum(stop - start for start, stop in subset.rows)
    if outputs == columns:
        return ScaleRule(rows=subset.rows, offset=subset.offset)
    grouped = heads.query // heads.kv
    if subset.reads == "heads" and allow_gqa and outputs * grouped == columns and outputs == heads.kv * heads.dim:
        return ScaleRule(grouped, heads.dim, subset.rows)
    return None


def fold_scale(
    prev: nn.Module, readers: Iterable[nn.Module], scale: Tensor, rule: ScaleRule, stored: torch.dtype
) -> None:
    """Divide ``prev``'s output channels by ``scale`` ``[in]`` and multiply the input channels of all ``readers``, which
    are Linears or have a weight ``[.., in]`` like them, by it, in place.

    ``prev`` will be stored in the checkpoint's dtype ``stored``. A norm is therefore rounded to it first, and the
    Linears are multiplied by the ratio that this rounding really left: the product is preserved exactly, where the
    naive fold would leave an error of half a bfloat16 step in every channel. Arithmetic is float32, or wider where the
    weights are.

    Raises:
        TypeError: ``prev`` has no weight to scale.
    """
    weight = prev.weight
    if not isinstance(weight, nn.Parameter):
        raise TypeError(f"{type(prev).__name__} has no weight that could absorb a scale")
    exact = torch.promote_types(weight.dtype, torch.float32)
    scale = scale.to(exact)
    divisor = rule.to_prev(scale)
    with torch.no_grad():
        if weight.dim() == 1:
            original = weight.to(exact) + rule.offset
            kept = (original / divisor - rule.offset).to(stored).to(exact)
            folded = kept + rule.offset
            usable = (folded != 0) & folded.isfinite() & (original != 0)
            scale = torch.where(usable, original / folded, torch.ones_like(divisor))
            divisor = scale
            weight.copy_(torch.where(usable, kept, weight.to(exact)))
        else:
            divisor = rule.over_rows(divisor, len(weight))
            weight.copy_(weight.to(exact) / divisor[:, None])
        if isinstance(bias := getattr(prev, "bias", None), nn.Parameter):
            bias.copy_(bias.to(exact) / divisor)
        for reader in readers:
            reader.weight.copy_(reader.weight.to(exact) * scale)  # type: ignore[operator]


def fold_shift(prev: nn.Module, linears: Iterable[nn.Linear], shift: Tensor, stored: torch.dtype) -> None:
    """Subtract ``shift`` ``[in]`` from ``prev``'s output and add ``W shift`` to the Linears' biases, in place.

    ``prev``'s bias is rounded to the dtype ``stored`` that it will be stored in, and the Linears make up for what was
    really subtracted.

    Raises:
        TypeError: a bias is missing.
    """
    bias = getattr(prev, "bias", None)
    if not isinstance(bias, nn.Parameter):
        raise TypeError(f"a shift needs biases, and a {type(prev).__name__} in front of it has none")
    exact = torch.promote_types(bias.dtype, torch.float32)
    with torch.no_grad():
        shifted = (bias.to(exact) - shift.to(exact)).to(stored).to(exact)
        moved = bias.to(exact) - shifted
        bias.copy_(shifted)
        for linear in linears:
            if linear.bias is None:
                raise TypeError("a shift needs biases, and a Linear that reads it has none")
            linear.bias.copy_(linear.bias.to(exact) + linear.weight.to(exact) @ moved)


def smoothed(
    weights: Mapping[str, Tensor],
    prev: str,
    linears: Sequence[str],
    divisor: Tensor,
    rule: ScaleRule,
    shift: Tensor | None = None,
) -> dict[str, Tensor]:
    """What ``fold_shift`` and then ``fold_scale`` would make of a block's weights, as new tensors that gradients pass.

    Nothing is rounded: this is for learning a scale, which is then folded.

    Args:
        weights: by name in the block; only those are in the result that change.
        prev: name of the norm or Linear that absorbs.
        linears: names of the readers, Linears or others with such a weight.
        divisor: ``[prev's outputs]``.
        rule: how the inputs map onto them.
        shift: ``[in]``, where inputs and ``prev``'s outputs are the same; the biases that absorb it must be there.

    Raises:
        KeyError: a bias is missing that a shift needs.
    """
    changed = {}
    weight, bias = weights[f"{prev}.weight"], weights.get(f"{prev}.bias")
    over_rows = divisor if weight.dim() == 1 else rule.over_rows(divisor, len(weight))
    divided = (weight + rule.offset) / divisor - rule.offset if weight.dim() == 1 else weight / over_rows[:, None]
    changed[f"{prev}.weight"] = divided
    if shift is not None:
        bias = weights[f"{prev}.bias"] - shift
    if bias is not None:
        changed[f"{prev}.bias"] = bias / over_rows
    scale = rule.to_inputs(divisor)
    for name in linears:
        weight = weights[f"{name}.weight"]
        changed[f"{name}.weight"] = weight * scale
        if shift is not None:
            changed[f"{name}.bias"] = weights[f"{name}.bias"] + weight @ shift
    return changed
