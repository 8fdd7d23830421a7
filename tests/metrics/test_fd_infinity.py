"""The extrapolated Fréchet distance: the line, its sizes, and the bias that it takes away."""

import numpy as np
import pytest
import torch

from etude.core.errors import UserError
from etude.metrics.fd_infinity import fd_infinity, fewest, intercept, sizes
from etude.metrics.figures import measure
from etude.metrics.frechet import frechet_distance
from etude.metrics.intervals import IntervalConfig
from etude.metrics.registry import METRICS, Pair


def cloud(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 8)))


def test_the_intercept_of_a_line_is_found() -> None:
    numbers = sizes(1000, 15)
    assert intercept(numbers, 3.0 + 40.0 / numbers) == pytest.approx(3.0, rel=1e-12)


def test_sizes_go_from_a_tenth_to_all() -> None:
    assert sizes(2000, 4).tolist() == [200, 800, 1400, 2000]
    assert sizes(100_000, 2).tolist() == [5000, 100_000]


def test_the_bias_over_n_goes() -> None:
    # Truth: 0, but for what the real side's own 20,000 rows add. At 500 rows of 8 dimensions the
    # plain distance is about 8 * 9 / 4 / 500 + ... = 0.05.
    real = cloud(20_000, 0)
    plain, extrapolated = [], []
    for seed in range(1, 13):
        generated = cloud(500, seed)
        plain.append(frechet_distance(real, generated))
        extrapolated.append(fd_infinity(real, generated))
    assert np.mean(plain) > 0.03
    assert abs(np.mean(extrapolated)) < np.mean(plain) / 5


@pytest.mark.parametrize(("count", "points"), [(16, 15), (3, 2), (109, 100), (22_221, 20_000)])
def test_the_fewest_pictures_make_parts_of_different_sizes(count: int, points: int) -> None:
    assert fewest(points) == count
    assert len(set(sizes(count, points))) == points > len(set(sizes(count - 1, points)))


def test_parts_of_one_size_fix_no_line() -> None:
    with pytest.raises(UserError, match="15 points need 16 generated pictures and there are 2"):
        fd_infinity(cloud(50, 0), cloud(2, 1))
    with pytest.raises(UserError, match="fd_infinity needs 16 pictures"):
        measure(Pair(cloud(50, 0), cloud(15, 1), "test"), "fd_infinity", IntervalConfig())
    found = measure(Pair(cloud(50, 0), cloud(16, 1), "test"), "fd_infinity", IntervalConfig())
    assert all(one.interval(IntervalConfig()).low is None for one in found.values())


def test_the_error_by_influences_is_that_of_fresh_draws() -> None:
    """Influences are known up to a constant, and the rows' places in the parts must not see it."""
    rng, options = np.random.default_rng(0), METRICS.get("fd_infinity").options(points=5)

    def draw() -> list[torch.Tensor]:
        return [torch.from_numpy(scale * rng.normal(size=(1000, 66))) for scale in (1, 2)]

    deviation = np.std([fd_infinity(*draw(), 5) for _ in range(60)], ddof=1)
    errors = []
    for _ in range(4):
        pair = Pair(*draw(), "test", options)
        (found,) = measure(pair, "fd_infinity", IntervalConfig(replicates=100)).values()
        errors.append(found.standard_error())
    # A deviation of 60 draws is known to 9%, three times which are allowed.
    assert np.mean(errors) / deviation == pytest.approx(1.0, abs=0.27)


def test_parts_smaller_than_the_dimensions_warn() -> None:
    with pytest.warns(UserWarning, match="4 pictures in 8"):
        fd_infinity(cloud(100, 0), cloud(40, 1), points=3)


def test_the_registered_figure_is_the_fit_and_names_its_features() -> None:
    metric = METRICS.get("fd_infinity")
    real, generated = cloud(300, 2), cloud(200, 3)
    pair = Pair(real, generated, "inception", metric.options(points=4))
    values = metric.values(pair, 1.0, *pair.everything())
    assert values["FID at infinity"][0] == fd_infinity(real, generated, 4)
    keep = [torch.arange(side)[None] % 2 == 0 for side in (300, 200)]
    halved = metric.values(pair, 0.5, *keep)["FID at infinity"][0]
    assert halved != values["FID at infinity"][0] and abs(halved) < 1.0
