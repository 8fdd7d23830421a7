"""Coverage of the intervals by simulation with a known truth, and the pieces they are made of.

The truth is the mean of the figure over many fresh draws of both sides. Every case is a fixed
sequence of draws, so the tests are deterministic; the bounds leave three standard deviations of the
number of trials to the nominal 90%. The kernel distance of classes that lie far apart is a skewed
sum of sixth powers at this n: its interval has the right width and covers 83%, so it gets more.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from etude.metrics.figures import FAMILIES, Pair, measure, measure_difference
from etude.metrics.frechet import frechet_distance
from etude.metrics.intervals import IntervalConfig, interval, kept_rows, proportion, shares

TRIALS, LEVEL = 100, 0.9
CONFIG = IntervalConfig(level=LEVEL, replicates=60)
CLASSES = 5
SKEWED = ("kid", "classes")


def gaussians(rows: int, dim: int, shift: float) -> Callable[[np.random.Generator], Pair]:
    def draw(rng: np.random.Generator) -> Pair:
        real = torch.from_numpy(rng.normal(size=(rows, dim)))
        other = rng.normal(size=(rows, dim)) * (1 - shift / 3) + 2 * shift / dim**0.5
        return Pair(real, torch.from_numpy(other), "test", k=5)

    return draw


def classes_in_turn(rows: int) -> Callable[[np.random.Generator], Pair]:
    labels = torch.arange(rows) % CLASSES
    places = np.random.default_rng(0).normal(size=(CLASSES, 4)) * 4

    def draw(rng: np.random.Generator) -> Pair:
        one, two = (torch.from_numpy(places[labels] + rng.normal(size=(rows, 4))) for _ in "ab")
        return Pair(one, two * 1.1, "test", 5, labels, labels)

    return draw


CASES = {
    "equal": gaussians(120, 6, 0.0),
    "apart": gaussians(120, 4, 0.4),
    "classes": classes_in_turn(120),
}


def value(metric: str, pair: Pair) -> dict[str, float]:
    return {
        n: float(v[0]) for n, v in FAMILIES[metric].values(pair, 1.0, *pair.everything()).items()
    }


@cache
def truth(metric: str, case: str) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each figure over 600 fresh draws."""
    rng = np.random.default_rng(1)
    drawn = [value(metric, CASES[case](rng)) for _ in range(600)]
    return {n: (np.mean([d[n] for d in drawn]), np.std([d[n] for d in drawn])) for n in drawn[0]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("metric", ["frechet", "kid", "prdc"])
def test_intervals_cover_the_expected_value(metric: str, case: str) -> None:
    expected, rng = truth(metric, case), np.random.default_rng(2)
    hits: dict[str, list[bool]] = {name: [] for name in expected}
    widths: dict[str, list[float]] = {name: [] for name in expected}
    for trial in range(TRIALS):
        for name, found in measure(CASES[case](rng), [metric], CONFIG, seed=trial).items():
            mean, deviation = expected[name]
            hits[name].append(found.low <= mean <= found.high)
            widths[name].append((found.high - found.low) / (2 * 1.645 * deviation))
    for name in expected:
        assert np.mean(hits[name]) > LEVEL - (0.15 if (metric, case) == SKEWED else 0.085), name
        # Right, and not by being useless: near the width that knowing the spread would give.
        # Without its second-order part a smooth figure's width at equality is 1.4.
        assert 0.8 < np.median(widths[name]) < (2.0 if metric == "prdc" else 1.25), name


def test_half_sampling_covers_too() -> None:
    config = IntervalConfig(method="subsampling", level=LEVEL, replicates=100)
    expected, rng = truth("frechet", "apart"), np.random.default_rng(3)
    hits = []
    for trial in range(TRIALS):
        for name, found in measure(CASES["apart"](rng), ["frechet"], config, seed=trial).items():
            hits.append(found.low <= expected[name][0] <= found.high)
    assert np.mean(hits) > LEVEL - 0.085


def test_the_naive_bootstrap_would_not() -> None:
    mean, rng, hits = truth("frechet", "equal"), np.random.default_rng(4), []
    for _ in range(20):
        pair = CASES["equal"](rng)
        drawn = [
            frechet_distance(
                *(side[rng.integers(0, 120, 120)] for side in (pair.real, pair.generated))
            )
            for _ in range(60)
        ]
        low, high = np.quantile(drawn, [0.05, 0.95])
        hits.append(low <= next(iter(mean.values()))[0] <= high)
    assert np.mean(hits) < 0.3


def test_class_shares_that_are_fixed_do_not_widen_the_interval() -> None:
    pair = CASES["classes"](np.random.default_rng(5))
    blind = Pair(pair.real, pair.generated, "test", 5)
    (fixed,) = measure(pair, ["frechet"], CONFIG).values()
    (drawn,) = measure(blind, ["frechet"], CONFIG).values()
    assert drawn.standard_error > 1.3 * fixed.standard_error


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    rng = np.random.default_rng(6)
    real, noise = torch.from_numpy(rng.normal(size=(200, 4))), rng.normal(size=(200, 4))
    a = Pair(real, torch.from_numpy(1.0 + noise), "test")
    b = Pair(real, torch.from_numpy(1.2 + noise), "test")
    (paired,) = measure_difference(a, b, ["frechet"], CONFIG, paired=True).values()
    (apart,) = measure_difference(a, b, ["frechet"], CONFIG, paired=False).values()
    assert (
        paired.value
        == apart.value
        == pytest.approx(
            frechet_distance(b.real, b.generated) - frechet_distance(a.real, a.generated)
        )
    )
    assert paired.standard_error < 0.6 * apart.standard_error
    assert paired.low > 0.0


def test_subsets_have_the_right_size_and_are_reproducible() -> None:
    kept = kept_rows(101, 0.3, 50, seed=7)
    assert torch.equal(kept.sum(1), torch.full((50,), 30))
    assert torch.equal(kept, kept_rows(101, 0.3, 50, seed=7))
    assert not torch.equal(kept, kept_rows(101, 0.3, 50, seed=7, side=1))
    # Every row is kept equally often: 50 * 0.297 times, binomially.
    assert abs(float(kept.float().mean(0).std()) - (0.297 * 0.703 / 50) ** 0.5) < 0.02


def test_strata_keep_their_shares() -> None:
    strata = torch.tensor([4] * 10 + [1] * 30 + [2] * 60)[torch.arange(100) * 37 % 100]
    kept = kept_rows(100, 0.5, 20, seed=0, strata=strata)
    for stratum, rows in ((4, 5), (1, 15), (2, 30)):
        assert torch.equal(kept[:, strata == stratum].sum(1), torch.full((20,), rows))


def test_a_proportion_has_wilsons_interval() -> None:
    # Wilson (1927): 8 of 10 at 95% gives 0.4902 to 0.9433.
    found = proportion(0.8, 10, IntervalConfig())
    assert (found.low, found.high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )
    everything = proportion(1.0, 10, IntervalConfig())
    assert everything.high == 1.0 and everything.low == pytest.approx(0.7225, abs=1e-4)


def test_shares_stay_above_what_a_covariance_needs() -> None:
    assert shares("smooth", "jackknife", 0.1) == [0.9, 0.3]
    assert shares("smooth", "jackknife", 0.4) == [0.9, pytest.approx(0.46)]
    assert shares("smooth", "jackknife", 0.7) == [0.9]
    assert shares("local", "jackknife", 0.1) == shares("smooth", "subsampling", 0.1) == [0.5]


def test_no_replicates_give_no_interval() -> None:
    found = interval("x", 1.0, {}, IntervalConfig(replicates=0))
    assert (found.value, found.low, found.high) == (1.0, None, None)
