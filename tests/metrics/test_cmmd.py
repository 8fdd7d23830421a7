"""CMMD against the sum over all pairs, both estimators, and subsets."""

import numpy as np
import pytest
import torch

from etude.core.errors import UserError
from etude.metrics.cmmd import CmmdOptions, cmmd, cmmd_of_subsets
from etude.metrics.figures import measure
from etude.metrics.intervals import IntervalConfig
from etude.metrics.registry import METRICS, Pair


def cloud(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (count, 7))


def plain(x: np.ndarray, y: np.ndarray, sigma: float, unbiased: bool) -> float:
    """Gretton et al. 2012, equations 3 and 5, written over pairs."""
    x, y = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (x, y))

    def mean(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        gaps = ((a[:, None] - b[None]) ** 2).sum(2)
        k = np.exp(-gaps / (2 * sigma**2))
        n = len(a)
        return (k.sum() - n) / (n * (n - 1)) if same and unbiased else k.mean()

    return 1000 * (mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False))


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("sigma", [10.0, 0.5])
def test_it_is_the_sum_over_pairs(estimator: str, sigma: float) -> None:
    x, y = cloud(23, 0), cloud(31, 1, 0.4)
    found = cmmd(torch.from_numpy(x), torch.from_numpy(y), estimator=estimator, sigma=sigma)
    expected = plain(x, y, sigma, estimator == "unbiased")
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_equal_sets_have_none_by_the_published_estimator() -> None:
    x = torch.from_numpy(cloud(40, 2))
    assert cmmd(x, x.clone()) == pytest.approx(0.0, abs=1e-9)
    assert cmmd(x, x.clone(), estimator="unbiased") < -1e-3


def test_the_registered_figure_takes_its_options_and_subsets() -> None:
    x, y = cloud(30, 3), cloud(26, 4, 0.3)
    options = CmmdOptions(estimator="unbiased", sigma=1.0)
    pair = Pair(torch.from_numpy(x), torch.from_numpy(y), "clip", options)
    rng = np.random.default_rng(5)
    keep = [torch.from_numpy(rng.random((3, len(side))) < 0.6) for side in (x, y)]
    found = METRICS.get("cmmd").values(pair, 0.6, *keep)["CMMD"]
    for value, one, two in zip(found, *keep, strict=True):
        assert value == pytest.approx(plain(x[one], y[two], 1.0, True), rel=1e-9, abs=1e-9)
    again = cmmd_of_subsets(pair.real, pair.generated, *keep, CmmdOptions(sigma=1.0))
    assert not np.allclose(again, found)  # what is kept of a side knows its estimator


@pytest.mark.parametrize("length", [0.0, 1e-13])
def test_embeddings_without_a_direction_have_one_of_their_own(length: float) -> None:
    x, y = torch.from_numpy(cloud(60, 6)), torch.from_numpy(cloud(60, 7))
    y[4] *= length
    y[9] = 0.0
    wider = [torch.cat([side, torch.zeros(60, 1).double()], 1) for side in (x, y)]
    wider[1][[4, 9]] = torch.eye(wider[1].shape[1]).double()[-1]
    assert cmmd(x, y) == pytest.approx(cmmd(*wider), rel=1e-9)
    (found,) = measure(Pair(x, y, "clip"), "cmmd", IntervalConfig(replicates=0)).values()
    assert found.value == pytest.approx(cmmd(*wider), rel=1e-9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sigma": 0.0}, "cmmd.sigma: Input should be greater than 0, got 0.0"),
        (
            {"estimator": "unbias"},
            "cmmd.estimator: Input should be 'biased' or 'unbiased', got 'unbias'",
        ),
    ],
)
def test_options_that_do_not_exist_are_refused_in_one_sentence(given: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        cmmd(torch.ones(3, 2), torch.ones(3, 2), **given)
    assert str(caught.value) == said
