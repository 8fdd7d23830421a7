"""Moments against numpy in float64, and their merging."""

import numpy as np
import pytest
import torch

from etude.metrics.moments import Moments


def features(rows: int, seed: int, dim: int = 7) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(3.0, 2.0, (rows, dim))).float()


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_mean_and_covariance_are_numpys(block: int) -> None:
    x = features(101, 0)
    found = Moments.of(x, block)
    exact = x.numpy().astype(np.float64)
    assert found.count == 101
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance(), np.cov(exact.T), rtol=1e-11, atol=1e-13)


def test_parts_merge_in_any_order_to_the_whole() -> None:
    parts = [features(rows, seed) for seed, rows in enumerate((1, 50, 3, 200))]
    whole = Moments.of(torch.cat(parts))
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        total = Moments.empty(7)
        for number in order:
            total = total.merge(Moments.of(parts[number]))
        assert total.count == whole.count
        torch.testing.assert_close(total.mean, whole.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(total.scatter, whole.scatter, rtol=1e-11, atol=1e-11)


def test_a_large_mean_costs_no_digits() -> None:
    x = features(500, 1).double() + 1e7
    shifted = Moments.of(x, 64).covariance()
    torch.testing.assert_close(shifted, Moments.of(x - 1e7).covariance(), rtol=1e-6, atol=1e-6)


def test_one_row_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        Moments.of(features(1, 0)).covariance()


def test_rows_that_go_leave_the_moments_of_the_others() -> None:
    x = features(120, 2)
    left = Moments.of(x).without(Moments.of(x[::3]))
    expected = Moments.of(x[torch.arange(120) % 3 != 0])
    assert left.count == expected.count == 80
    torch.testing.assert_close(left.mean, expected.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(left.scatter, expected.scatter, rtol=1e-10, atol=1e-9)
    with pytest.raises(ValueError, match="none would be left"):
        left.without(left)
