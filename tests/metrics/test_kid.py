"""KID against a plain double sum, its unbiasedness, and subset replicates."""

import numpy as np
import pytest
import torch

from etude.metrics.kid import kid, kid_of_subsets


def plain(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1.0) ** 3

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    across = sum(kernel(a, b) for a in x for b in y)
    return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m)


@pytest.mark.parametrize("block", [3, 2048])
def test_it_is_the_double_sum(block: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(17, 5)), rng.normal(0.4, 1.3, size=(23, 5))
    found = kid(torch.from_numpy(x), torch.from_numpy(y), block)
    assert found == pytest.approx(plain(x, y), rel=1e-11)


def test_replicates_are_the_kid_of_each_subset() -> None:
    rng = np.random.default_rng(1)
    x, y = torch.from_numpy(rng.normal(size=(19, 4))), torch.from_numpy(rng.normal(size=(16, 4)))
    keep_x = torch.from_numpy(rng.random((6, 19)) < 0.5)
    keep_y = torch.from_numpy(rng.random((6, 16)) < 0.6)
    found = kid_of_subsets(x, y, keep_x, keep_y, block=5)
    expected = [kid(x[a], y[b]) for a, b in zip(keep_x, keep_y, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_it_is_unbiased_at_equality() -> None:
    rng = np.random.default_rng(2)
    found = [
        kid(torch.from_numpy(rng.normal(size=(12, 3))), torch.from_numpy(rng.normal(size=(12, 3))))
        for _ in range(800)
    ]
    assert abs(np.mean(found)) < 4 * np.std(found) / 800**0.5
