"""The extrapolated Fréchet distance: the line, its sizes, and the bias that it takes away."""

import numpy as np
import pytest
import torch

from etude.metrics.fd_infinity import fd_infinity, intercept, sizes
from etude.metrics.frechet import frechet_distance
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
