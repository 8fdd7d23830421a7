"""KID against a plain double sum, its unbiasedness, and subset replicates."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from etude.core.errors import UserError
from etude.metrics.figures import measure
from etude.metrics.intervals import IntervalConfig
from etude.metrics.kid import KidOptions, drawn_parts, kid, kid_of_parts, kid_of_subsets
from etude.metrics.registry import METRICS, Pair


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


def test_parts_are_the_kid_of_their_rows() -> None:
    rng = np.random.default_rng(3)
    x, y = torch.from_numpy(rng.normal(size=(30, 4))), torch.from_numpy(rng.normal(size=(26, 4)))
    rows = [torch.from_numpy(rng.integers(0, 26, (5, 9))) for _ in range(2)]
    found = kid_of_parts(x, y, *rows)
    expected = [plain(x[a].numpy(), y[b].numpy()) for a, b in zip(*rows, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_drawn_parts_are_kept_rows_without_repetition_and_differ_by_side() -> None:
    keep = torch.arange(50) % 3 != 0
    options = KidOptions(parts=4, part_size=20)
    one, two = (drawn_parts(keep, options, side) for side in (0, 1))
    assert one.shape == (4, 20) and bool(keep[one].all())
    assert all(len(set(part.tolist())) == 20 for part in one)
    assert len({tuple(part.tolist()) for part in (*one, *two)}) == 8
    assert torch.equal(one, drawn_parts(keep, options, 0))


def test_the_registered_figure_takes_all_pairs_or_parts() -> None:
    rng = np.random.default_rng(4)
    x, y = (torch.from_numpy(rng.normal(size=(count, 4))) for count in (60, 50))
    metric = METRICS.get("kid")

    def value(**options: int) -> float:
        pair = Pair(x, y, "inception", metric.options(**options))
        return float(metric.values(pair, 1.0, *pair.everything())["KID"][0])

    assert value() == pytest.approx(kid(x, y), rel=1e-12)
    assert value(parts=1, part_size=50) != pytest.approx(kid(x, y), rel=1e-6)  # of 60 rows
    many = value(parts=400, part_size=30)
    assert many == pytest.approx(kid(x, y), abs=0.15)  # the mean over parts has its expectation
    with pytest.raises(UserError, match="part_size=50 or less"):
        value(parts=2, part_size=51)
    with pytest.raises(ValidationError, match="part_size has no effect without parts"):
        value(part_size=10)


def test_with_parts_the_halves_take_all_pairs() -> None:
    rng = np.random.default_rng(6)
    x, y = (torch.from_numpy(rng.normal(size=(count, 4))) for count in (60, 50))
    metric, config = METRICS.get("kid"), IntervalConfig(replicates=20)
    found = {}
    for parts in (0, 3):  # parts of 40 rows cannot be had from halves
        options = metric.options(**({"parts": parts, "part_size": 40} if parts else {}))
        found[parts] = measure(Pair(x, y, "inception", options), metric, config)["KID"]
    assert found[0].value != found[3].value
    np.testing.assert_array_equal(found[0].drawn, found[3].drawn)


def test_what_is_kept_of_a_side_does_not_change_a_value() -> None:
    rng = np.random.default_rng(5)
    x, y, z = (torch.from_numpy(rng.normal(size=(20, 4))) for _ in range(3))
    first = kid(x, y)
    assert kid(x, z) == pytest.approx(plain(x.numpy(), z.numpy()), rel=1e-10)
    assert kid(x, y) == first
    x *= 2.0
    assert kid(x, y) == pytest.approx(plain(x.numpy(), y.numpy()), rel=1e-10)


def test_a_block_without_rows_is_refused() -> None:
    with pytest.raises(UserError, match="block=0 holds no rows; set it to 1 or more"):
        kid(torch.ones(3, 2), torch.ones(3, 2), block=0)
