"""Constructed Hadamard matrices, exactly in integers; the fast product against the dense one."""

from __future__ import annotations

import pytest
import torch

from llmc.linalg import hadamard
from llmc.linalg.hadamard import paley

# Widths of hidden states, feed-forward layers and heads of published models.
WIDTHS = [64, 80, 96, 128, 576, 768, 896, 960, 1536, 2304, 2560, 3072, 3584, 4096, 4864, 5120, 6912, 8192, 8960, 9728]
WIDTHS += [11008, 12288, 13824, 14336, 16384, 17408, 18944, 25600, 27648, 28672, 29568, 53248]
# Below 200 these multiples of 4 are known only by other constructions than Paley's and Kronecker's.
BEYOND = {92, 116, 156, 172, 184, 188}


@pytest.mark.parametrize("order", sorted({1, 2, *range(4, 200, 4)} - BEYOND))
def test_rows_are_orthogonal(order):
    matrix = hadamard(order).matrix()
    assert matrix.dtype == torch.int64
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int64))


# Fields of 11, 27, 17, 25, 49, 107, 3⁵, 13², 7³ and 5⁴ elements; q + 1 or 2 (q + 1) rows.
@pytest.mark.parametrize("order", [12, 28, 36, 52, 100, 108, 244, 340, 344, 1252])
def test_the_matrices_of_fields_of_any_degree_are_orthogonal(order):
    matrix = paley(order)
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    exact = matrix.double()  # sums of ±1: exact in float64, and faster than in integers
    assert torch.equal(exact @ exact.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_widths_of_published_models_have_one_with_small_dense_factors(width):
    found = hadamard(width)
    assert found.order == width
    assert sum(found.dense) <= 344
    for order in found.dense:
        exact = paley(order).double()
        assert torch.equal(exact @ exact.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 10, 42, 232, *sorted(BEYOND)])
def test_other_orders_are_not_claimed(order):
    assert hadamard(order) is None


def test_an_order_without_a_field_is_refused():
    with pytest.raises(ValueError, match="order 92"):
        paley(92)


@pytest.mark.parametrize("order", [1, 2, 8, 12, 40, 128, 144, 256, 336, 576, 1024, 1536])
def test_the_fast_product_is_the_dense_one(order):
    rows = torch.randn(3, 2, order, dtype=torch.float64, generator=torch.Generator().manual_seed(order))
    found = hadamard(order)
    expected = rows @ found.matrix().double()
    torch.testing.assert_close(found.multiply(rows), expected, rtol=1e-13, atol=1e-12)


def test_a_product_of_several_dense_factors_uses_each():
    found = hadamard(29568)
    assert sorted(found.dense) == [12, 28, 44]
    assert found.power == 2
    row = torch.zeros(1, found.order, dtype=torch.float64)
    row[0, 12345] = 1
    product = torch.ones(1, dtype=torch.int64)
    index, size = 12345, found.order
    for order in found.dense:
        size //= order
        product = torch.kron(product, paley(order)[index // size])
        index %= size
    product = torch.kron(product, torch.tensor([[1, 1], [1, -1]])[index])
    assert torch.equal(found.multiply(row)[0], product.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_keeps_dtype_and_argument(dtype):
    rows = torch.ones(2, 24, dtype=dtype)
    assert hadamard(24).multiply(rows).dtype == dtype
    assert torch.equal(rows, torch.ones_like(rows))
