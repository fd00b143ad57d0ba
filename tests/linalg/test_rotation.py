"""Rotations are orthogonal, depend on nothing but their arguments, and keep the mean where they're asked to."""

from __future__ import annotations

import pytest
import torch

from llmc.linalg import OnlineRotation, hadamard, make_rotation

SIZES = [1, 2, 16, 36, 92, 7]  # the last two have no constructed Hadamard matrix


def matrix_of(rotation, size):
    return rotation(torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_orthogonal(size, random, keeps_mean):
    matrix = matrix_of(make_rotation(size, 3, random=random, keeps_mean=keeps_mean), size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_mean_is_kept_and_its_subtraction_commutes(size, random):
    rotation = make_rotation(size, 1, random=random, keeps_mean=True)
    rows = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    turned = rotation(rows)
    torch.testing.assert_close(turned.mean(1), rows.mean(1), rtol=0, atol=1e-13)
    centered = rotation(rows - rows.mean(1, keepdim=True))
    torch.testing.assert_close(turned - turned.mean(1, keepdim=True), centered, rtol=0, atol=1e-13)
    if size > 2:
        plain = make_rotation(size, 1, random=random)(rows)
        assert (plain.mean(1) - rows.mean(1)).abs().max() > 0.1  # it isn't kept by chance


def test_a_hadamard_rotation_has_entries_of_one_size():
    torch.testing.assert_close(matrix_of(make_rotation(144, 5), 144).abs(), torch.full((144, 144), 1 / 12).double())


def test_keeping_the_mean_leaves_all_rows_but_one_nearly_as_they_were():
    entries = matrix_of(make_rotation(768, 5, keeps_mean=True), 768).abs() * 768**0.5
    changed = (entries - 1).abs().amax(1).sort().values
    assert changed[-2] < 0.25
    assert changed[-1] < 5


def test_the_seed_decides_and_nothing_else():
    def fresh(seed, **options):
        make_rotation.cache_clear()
        torch.manual_seed(torch.randint(1000, ()).item())
        return matrix_of(make_rotation(64, seed, **options), 64)

    for options in ({}, {"random": True}, {"keeps_mean": True}):
        assert torch.equal(fresh(1, **options), fresh(1, **options))
        assert not torch.equal(fresh(1, **options), fresh(2, **options))


def test_it_computes_in_the_dtype_of_the_rows():
    rotation = make_rotation(24, 0, keeps_mean=True)
    rows = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    exact = rotation(rows.double())
    assert rotation(rows).dtype == torch.float32
    torch.testing.assert_close(rotation(rows).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [16, 40, 1536])
def test_an_online_rotation_is_the_dense_hadamard_matrix(size):
    rotation = OnlineRotation(hadamard(size))
    dense = hadamard(size).matrix().double() / size**0.5
    torch.testing.assert_close(matrix_of(rotation, size), dense, rtol=0, atol=1e-14)
    torch.testing.assert_close(dense @ dense.T, torch.eye(size).double(), rtol=0, atol=1e-12)


def test_an_online_rotation_of_fewer_channels_turns_each_run_of_them_by_itself():
    rows = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = torch.block_diag(*[hadamard(8).matrix().double() / 8**0.5] * 3)
    torch.testing.assert_close(OnlineRotation(hadamard(8))(rows), rows @ dense, rtol=0, atol=1e-14)


def test_an_online_rotation_computes_16_bits_in_float32_if_asked():
    rows = torch.randn(5, 3, 1536, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = OnlineRotation(hadamard(1536))(rows.double())
    single, half = (OnlineRotation(hadamard(1536), single=single)(rows) for single in (True, False))
    assert single.dtype == half.dtype == torch.bfloat16
    assert torch.equal(single, exact.float().bfloat16()) or (single.double() - exact).abs().max() < 2**-8 * 4
    assert (half.double() - exact).norm() > 1.2 * (single.double() - exact).norm()
