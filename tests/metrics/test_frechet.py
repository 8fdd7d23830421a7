"""The Frechet distance against closed forms, through every route of the trace."""

import numpy as np
import pytest
import torch

from etude.metrics.frechet import frechet_distance, frechet_name
from etude.metrics.moments import Moments


def sample(rows: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) / dim**0.5
    return torch.from_numpy(rng.normal(size=(rows, dim)) @ mix * scale + shift)


def test_commuting_covariances_have_a_closed_form() -> None:
    # y = 3 x + 2: covariances S and 9 S, so d^2 = D 4 + (3 - 1)^2 tr S + terms of the mean.
    x = sample(300, 5, 0)
    y = 3 * x + 2
    mean, trace = x.mean(0), torch.cov(x.T).trace()
    expected = (2 * mean + 2).square().sum() + 4 * trace
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-10)


def test_one_dimension_is_the_difference_of_means_and_deviations() -> None:
    x, y = sample(50, 1, 1), sample(80, 1, 2, scale=2.0, shift=1.0)
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("rows", [200, 12])
def test_equal_sets_have_distance_zero_and_sides_may_swap(rows: int) -> None:
    x, y = sample(rows, 20, 3), sample(rows + 5, 20, 4, shift=0.3)
    assert frechet_distance(x, x, warn=False) == pytest.approx(0.0, abs=1e-9)
    there, back = frechet_distance(x, y, warn=False), frechet_distance(y, x, warn=False)
    assert there == pytest.approx(back, rel=1e-9)


def test_rows_and_their_moments_agree_when_covariances_are_singular() -> None:
    x, y, many = sample(12, 20, 5), sample(15, 20, 6, shift=0.5), sample(400, 20, 7)
    for one, two in ((x, y), (x, many), (many, y)):
        rows = frechet_distance(one, two, warn=False)
        moments = frechet_distance(Moments.of(one), Moments.of(two), warn=False)
        assert rows == pytest.approx(moments, rel=1e-6)


def test_a_constant_feature_is_no_trouble() -> None:
    x, y = sample(100, 6, 8), sample(90, 6, 9, shift=0.2)
    plain = frechet_distance(x, y)
    one = torch.ones(100, 1, dtype=x.dtype)
    found = frechet_distance(torch.cat([x, one], 1), torch.cat([y, 3 * one[:90]], 1))
    assert found == pytest.approx(plain + 4.0, rel=1e-7)


def test_too_few_rows_warn() -> None:
    with pytest.warns(UserWarning, match="prefer KID"):
        frechet_distance(sample(10, 20, 0), sample(10, 20, 1))


def test_only_inception_features_give_an_fid() -> None:
    assert frechet_name("inception") == "FID"
    assert frechet_name("classifier") == "Fréchet distance (classifier features)"
