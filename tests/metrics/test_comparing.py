"""Differences of figures with known truth, several at once, and how many pictures would tell."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from etude.metrics.comparing import (
    difference,
    error_of_contrast,
    holm,
    level_of_each,
    needed,
    with_holm,
)
from etude.metrics.estimates import Estimate
from etude.metrics.figures import mean_of_scores, measure
from etude.metrics.frechet import frechet_distance
from etude.metrics.intervals import IntervalConfig
from etude.metrics.registry import Pair

CONFIG = IntervalConfig(replicates=100)


def measured(pair: Pair, metric: str, seed: int = 0) -> Estimate:
    (found,) = measure(pair, metric, CONFIG, seed).values()
    return found


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    rng = np.random.default_rng(6)
    real = torch.from_numpy(rng.normal(size=(200, 4)))
    noise, other = (rng.normal(size=(200, 4)) for _ in "ab")
    sets = {"a": 1.0 + noise, "same seeds": 1.2 + noise, "own seeds": 1.2 + other}
    found = {
        name: next(
            iter(measure(Pair(real, torch.from_numpy(x), "test"), "frechet", CONFIG).values())
        )
        for name, x in sets.items()
    }
    paired, apart = (difference(found[n], found["a"], CONFIG) for n in ("same seeds", "own seeds"))
    expected = [frechet_distance(real, torch.from_numpy(sets[n])) for n in ("a", "same seeds")]
    assert paired.value == pytest.approx(expected[1] - expected[0])
    assert paired.standard_error < 0.6 * apart.standard_error
    assert paired.low > 0.0 and paired.p_value < 0.05
    # The reference is common to both: less than two independent errors.
    alone = [found[n].standard_error() for n in ("a", "own seeds")]
    assert apart.standard_error < 0.9 * np.hypot(*alone)


@pytest.mark.parametrize("metric", ["frechet", "kid"])
def test_equal_models_are_seldom_told_apart(metric: str) -> None:
    rng, p_values = np.random.default_rng(7), []
    for trial in range(60):
        real, a, b = (torch.from_numpy(rng.normal(size=(100, 3))) for _ in "rab")
        one, two = (measured(Pair(real, x + 0.3, "test"), metric, trial) for x in (a, b))
        p_values.append(difference(two, one, CONFIG).p_value)
    # 5% of 60 is 3; eight or more have a chance of 1 in 100.
    assert sum(p < 0.05 for p in p_values) < 8
    assert np.median(p_values) > 0.25


def test_differences_of_means_are_scipys_paired_test() -> None:
    rng = np.random.default_rng(8)
    a = rng.exponential(size=40)
    b = a + 0.1 * rng.normal(size=40) + 0.05
    one, two = (mean_of_scores("score", x, CONFIG) for x in (a, b))
    found, expected = difference(two, one, CONFIG), stats.ttest_rel(b, a)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    ends = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), rel=1e-9)
    assert found.degrees_of_freedom == pytest.approx(39)


def test_other_halves_count_as_independent() -> None:
    rng = np.random.default_rng(9)
    one, two = (mean_of_scores("score", rng.normal(size=n), CONFIG) for n in (50, 70))
    found = difference(two, one, CONFIG)
    errors = [e.standard_error() for e in (one, two)]
    assert found.standard_error == pytest.approx(np.hypot(*errors), rel=1e-12)


def test_weights_of_a_contrast_count() -> None:
    x = np.random.default_rng(10).normal(size=(3, 60))
    terms = [
        (w, mean_of_scores("score", row, CONFIG)) for w, row in zip((0.5, 0.5, -1), x, strict=True)
    ]
    found = error_of_contrast(terms)
    combined = 0.5 * x[0] + 0.5 * x[1] - x[2]
    assert found.standard_error == pytest.approx(stats.sem(combined), rel=1e-9)
    assert error_of_contrast([(1.0, Estimate("x", 1.0))]) is None


def test_without_replicates_only_the_difference_is_known() -> None:
    found = difference(Estimate("x", 3.0), Estimate("x", 1.0), CONFIG)
    assert (found.value, found.low, found.p_value) == (2.0, None, None)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_shares_of_none_and_all_have_an_error(scale: float) -> None:
    """No half of them differs from another; the truth may."""
    name = {1.0: "precision", 100.0: "AuthPct"}[scale]

    def share(value: float, count: int, drawn_by: str = "") -> Estimate:
        drawn = {0.5: np.full(200, scale * value)}
        return Estimate(
            name, scale * value, drawn, "local", count=count, units=count, drawn_by=drawn_by
        )

    found = difference(share(0.0, 20, "b"), share(1.0, 20, "a"))
    # Agresti and Caffo (2000) put one success and one failure a sample, Wilson's centre two.
    assert found.standard_error == pytest.approx(scale * (2 * (22 / 24) * (2 / 24) / 20) ** 0.5)
    assert found.low < -scale < found.high < 0.0 < found.p_value < 1e-6
    assert share(1.0, 20).standard_error() == pytest.approx(found.standard_error / 2**0.5)
    exact = stats.fisher_exact([[0, 4], [4, 0]]).pvalue
    assert exact == pytest.approx(0.0286, abs=1e-4)
    for drawn_by in ("a", "b"):  # halved together, and apart
        few = difference(share(0.0, 4, "a"), share(1.0, 4, drawn_by))
        assert exact / 2 < few.p_value < 2 * exact
    draws = share(1.0, 20).draws()
    assert np.std(draws) == pytest.approx(share(1.0, 20).standard_error())
    assert not np.array_equal(draws - scale, share(0.0, 20).draws())


def test_ordinary_shares_keep_the_error_of_their_halves() -> None:
    rng, drawn_by = np.random.default_rng(12), "the same seeds"
    halves = rng.binomial(100, 0.9, (2, 200)) / 100
    a, b = (
        Estimate("precision", 0.9, {0.5: half}, "local", count=200, drawn_by=drawn_by)
        for half in halves
    )
    plain = [replace(one, name="x") for one in (a, b)]
    scale = [one.standard_error() / other.standard_error() for one, other in ((a, b), plain)]
    assert scale[0] == pytest.approx(scale[1], rel=0.05)
    together = a.spread.half - b.spread.half
    assert difference(a, b).standard_error == pytest.approx(np.mean(together**2) ** 0.5, rel=1e-12)


def test_several_comparisons_are_held_against_each_other() -> None:
    rng = np.random.default_rng(11)
    scores = {
        name: rng.normal(size=80) + shift for name, shift in zip("abc", (0, 0.2, 1), strict=True)
    }
    models = {name: mean_of_scores("score", x, CONFIG) for name, x in scores.items()}
    pairs = {(b, a): (models[b], models[a]) for a, b in ("ab", "ac", "bc")}
    found = with_holm({key: difference(*of, CONFIG) for key, of in pairs.items()})
    assert set(found) == {("b", "a"), ("c", "a"), ("c", "b")}
    raw = [one.p_value for one in found.values()]
    assert [one.adjusted_p_value for one in found.values()] == holm(raw)
    assert level_of_each(0.95, 3) == pytest.approx(1 - 0.05 / 3)
    assert with_holm({}) == {}


def test_holm_of_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_as_many_pictures_as_are_said_to_be_needed_have_the_power() -> None:
    # A difference of 0.1 with error 0.1 at 400 pictures. With n pictures the error is
    # 0.1 (400 / n)^(1/2), and the chance of |z| > 1.96 is 0.8 at the number given.
    count = needed(0.1, 0.1, 400)
    shift = 0.1 / (0.1 * (400 / count) ** 0.5)
    power = stats.norm.sf(stats.norm.ppf(0.975) - shift)
    assert power == pytest.approx(0.8, abs=1e-3)
    assert needed(1.0, 0.1, 400) == 400
    assert needed(0.0, 0.1, 400) is None
