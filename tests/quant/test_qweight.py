"""``QWeight`` stands for ``(codes - zero) * scale`` rounded once, to the scale's dtype, in every layout of groups."""

from __future__ import annotations

import pytest
import torch

from llmc.quant import PerChannel, PerGroup, PerTensor, QuantSpec, QWeight


def random_weight(spec: QuantSpec, groups: tuple[int, int], group_index: torch.Tensor | None = None) -> QWeight:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (4, 12), generator=generator)
    zero = torch.randint(-8, 8, groups, generator=generator)
    scale = torch.rand(groups, generator=generator).to(spec.scale_dtype)
    return QWeight.from_float(codes.float(), scale.float(), zero.float(), spec, group_index)


def by_hand(weight: QWeight, group_of: list[int]) -> torch.Tensor:
    """One exact product at a time, rounded to the dtype of the scales."""
    dense = torch.empty(weight.codes.shape, dtype=torch.float64)
    for row in range(len(dense)):
        for column, group in enumerate(group_of):
            at = (row if len(weight.scale) > 1 else 0), group
            zero = 0 if weight.zero is None else weight.zero[at].item()
            dense[row, column] = (weight.codes[row, column].item() - zero) * weight.scale[at].item()
    return dense.float().to(weight.scale.dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("granularity", "groups"), [(PerTensor(), (1, 1)), (PerChannel(), (4, 1)), (PerGroup(4), (4, 3))]
)
def test_groups_of_consecutive_columns(symmetric, scale_dtype, granularity, groups):
    weight = random_weight(QuantSpec(4, symmetric, granularity, scale_dtype=scale_dtype), groups)
    expected = by_hand(weight, [column * groups[1] // 12 for column in range(12)])
    assert torch.equal(weight.dequantize(), expected.float())
    assert torch.equal(weight.dequantize(torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_by_index(symmetric):
    index = [2, 0, 0, 1, 2, 1, 0, 2, 1, 1, 0, 2]
    weight = random_weight(QuantSpec(4, symmetric, PerGroup(4)), (4, 3), torch.tensor(index, dtype=torch.int32))
    assert torch.equal(weight.dequantize(), by_hand(weight, index))


def test_an_index_of_runs_is_no_index():
    spec = QuantSpec(4, False, PerGroup(4))
    index = torch.arange(12, dtype=torch.int32) // 4
    assert torch.equal(random_weight(spec, (4, 3), index).dequantize(), random_weight(spec, (4, 3)).dequantize())


def test_another_device_gets_every_part():
    index = torch.arange(12, dtype=torch.int32) // 4
    weight = random_weight(QuantSpec(4, False, PerGroup(4)), (4, 3), index).to("meta")
    assert {part.device.type for part in (weight.codes, weight.scale, weight.zero, weight.group_index)} == {"meta"}


def test_dtypes_are_the_stored_ones():
    weight = random_weight(QuantSpec(4, False, PerGroup(4), scale_dtype=torch.bfloat16), (4, 3))
    assert (weight.codes.dtype, weight.zero.dtype, weight.scale.dtype) == (torch.int8, torch.int8, torch.bfloat16)
    assert random_weight(QuantSpec(4, True, PerGroup(4)), (4, 3)).zero is None
