"""The one result of every weight quantizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .floats import widened
from .groups import from_groups, group_strips, to_groups
from .spec import QuantSpec


@dataclass(frozen=True)
class QWeight:
    """Codes with their scales: ``weight[o, i] = (codes[o, i] - zero[o, g]) * scale[o, g]``.

    Attributes:
        codes: ``[out, in]`` in ``spec.code_dtype``: int8, signed, in ``[spec.qmin, spec.qmax]``; on float grids the
            grid's values in an FP8 dtype.
        scale: ``[out, groups]`` in ``spec.scale_dtype`` (per tensor: ``[1, 1]``; blocks: one each). NVFP4 divides it by
            ``spec.global_scale``.
        zero: in ``spec.zero_dtype`` (int8; int16 of clusters), shaped like ``scale``; None on symmetric grids.
        spec: the grid.
        group_index: int32 ``[in]``, the group of each column where groups aren't runs of consecutive columns
            (act-order without static groups, clusters); None otherwise.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: QuantSpec
    group_index: Tensor | None = None

    @classmethod
    def from_float(
        cls, codes: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, group_index: Tensor | None = None
    ) -> QWeight:
        """Store codes, scales and zero points, all float (of the grid, scales already rounded), in their own dtypes."""
        # A product that rounding in float32 put beside the e4m3 number is rounded onto it.
        stored = scale if spec.global_scale is None else scale * scale.new_tensor(spec.global_scale)
        return cls(
            codes=codes.to(spec.code_dtype),
            scale=stored.to(spec.scale_dtype),
            zero=None if spec.symmetric else zero.to(spec.zero_dtype),
            spec=spec,
            group_index=group_index,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[out, in]`` in ``dtype``, holding values of the scales' dtype.

        A product of code and scale has more digits than a 16-bit scale. Backends multiply in the dtype of the scales
        and keep what fits, so that is the weight which is evaluated, propagated and saved. It's computed in float32
        and rounded once; ask for ``scale_dtype: float32`` to lose nothing. With scales of 8 bits the product stays in
        float32, and so does the product with ``spec.exact_product``.
        """
        dense = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for rows, part in self.dense_strips():
            dense[rows] = part
        return dense

    def dense_strips(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of ``dequantize`` at a time, which they are and their values, in the product's own dtype."""
        return ((rows, part._exact().to(self.spec.product_dtype)) for rows, part in self.strips())

    def strips(self) -> Iterator[tuple[slice, QWeight]]:
        """Some rows at a time, which they are and what they hold; square blocks stay whole."""
        for rows, own in group_strips(self.codes, self.spec):
            zero = None if self.zero is None else self.zero[own]
            yield rows, QWeight(self.codes[rows], self.scale[own], zero, self.spec, self.group_index)

    def _exact(self) -> Tensor:
        scale, zero = self.scale.float(), None if self.zero is None else self.zero.float()
        if self.spec.global_scale is not None:
            scale = scale / scale.new_tensor(self.spec.global_scale)
        if self.group_index is not None:
            index = self.group_index.long()
            values = widened(self.codes)
            values = values if zero is None else values - zero[:, index]
            return values * scale[:, index]
        values = to_groups(widened(self.codes), self.spec)
        if zero is not None:
            values -= zero[..., None]
        return from_groups(values.mul_(scale[..., None]), self.codes.shape, self.spec)

    def reordered(self, rows: Tensor | None, columns: Tensor | None) -> QWeight:
        """The same with output channels and input channels in another order, int64 ``[out]`` and ``[in]``; None keeps.

        Raises:
            ValueError: columns change places, and no index says which group a column belongs to.
        """
        codes, scale, zero, index = self.codes, self.scale, self.zero, self.group_index
        if rows is not None:
            codes, scale = codes[rows], scale[rows]
            zero = None if zero is None else zero[rows]
        if columns is not None:
            if index is None:
                raise ValueError("groups of consecutive columns can't be reordered")
            codes, index = codes[:, columns], index[columns]
        return QWeight(codes, scale, zero, self.spec, index)

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes, scales, zero points and the index of the groups."""
        return self.codes, self.scale, self.zero, self.group_index

    def to(self, device: torch.device | str) -> QWeight:
        """The same on another device."""
        moved = [None if t is None else t.to(device) for t in self.stored]
        codes, scale, zero, index = moved
        if codes is None or scale is None:
            raise ValueError("a quantized weight has codes and scales")
        return QWeight(codes, scale, zero, self.spec, index)
