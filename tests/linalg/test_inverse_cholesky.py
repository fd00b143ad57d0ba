"""The factor of the inverse, against float64 and against the customary detour over the inverse."""

from __future__ import annotations

import pytest
import torch

from llmc.linalg import inverse_cholesky


def gram(size: int, tokens: int | None = None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens or 4 * size, size, dtype=torch.float64, generator=generator)
    return inputs.T @ inputs


def damped(matrix: torch.Tensor, damp: float) -> torch.Tensor:
    matrix = matrix.double()
    return matrix + damp * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 17, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_the_factor_squares_to_the_damped_inverse(size, dtype, tolerance, damp):
    hessian = gram(size).to(dtype)
    factor = inverse_cholesky(hessian, damp)
    product = (factor.upper.T @ factor.upper).double() @ damped(hessian, damp)
    torch.testing.assert_close(product, torch.eye(size, dtype=torch.float64), rtol=0, atol=tolerance)
    assert factor.upper.dtype == dtype
    assert factor.damp == damp


def test_it_is_the_upper_cholesky_factor():
    hessian = gram(32)
    upper = inverse_cholesky(hessian, 0.01).upper
    expected = torch.linalg.cholesky(torch.linalg.inv(damped(hessian, 0.01)), upper=True)
    torch.testing.assert_close(upper, expected)
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()


def test_the_argument_is_left_as_it_was():
    hessian = gram(16)
    kept = hessian.clone()
    inverse_cholesky(hessian, 0.01)
    assert torch.equal(hessian, kept)


@pytest.mark.parametrize(
    ("lowest", "damp", "taken"), [(-0.05, 0.01, 0.1), (-0.5, 0.01, 1.0), (-5.0, 0.01, 10.0), (-0.005, 0.0, 0.01)]
)
def test_an_indefinite_matrix_is_damped_tenfold_until_it_factors(lowest, damp, taken):
    hessian = torch.diag(torch.tensor([lowest] + [(16 - lowest) / 15] * 15, dtype=torch.float64))  # mean diagonal: 1
    factor = inverse_cholesky(hessian, damp)
    assert factor.damp == pytest.approx(taken)
    torch.testing.assert_close(
        factor.upper.T @ factor.upper @ damped(hessian, taken), torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_a_singular_matrix_needs_damping():
    hessian = gram(32, tokens=4)
    assert inverse_cholesky(hessian, 0.01).damp == 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [(0, 0), (3, 5)])
def test_a_matrix_that_is_not_finite_has_no_factor(bad, at):
    hessian = gram(16)
    hessian[at] = hessian[at[::-1]] = bad
    assert inverse_cholesky(hessian, 0.01) is None


def test_a_negative_matrix_has_no_factor():
    assert inverse_cholesky(-gram(16), 0.01) is None


def test_retries_are_counted():
    hessian = torch.diag(torch.tensor([-5.0] + [21 / 15] * 15))
    assert inverse_cholesky(hessian, 0.01, retries=2) is None
    assert inverse_cholesky(hessian, 0.01, retries=3) is not None
