"""Intervals against their definitions, a direct likelihood search, and simulated coverage."""

import numpy as np
import pytest
from scipy import optimize, stats

from etude.core.errors import UserError
from etude.practice.paired import accuracy_interval, paired_difference, paired_interval


@pytest.mark.parametrize(("correct", "total"), [(0, 7), (7, 7), (3, 7), (90, 100), (437, 449)])
def test_the_ends_of_an_accuracy_interval_cut_off_the_tails(correct: int, total: int) -> None:
    interval = accuracy_interval(correct, total, level=0.9)
    if correct > 0:
        assert stats.binom.sf(correct - 1, total, interval.low) == pytest.approx(0.05, abs=1e-9)
    if correct < total:
        assert stats.binom.cdf(correct, total, interval.high) == pytest.approx(0.05, abs=1e-9)
    assert interval.low >= 0 and interval.high <= 1 and interval.value == correct / total


def _vectors(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.repeat([1, 1, 0, 0], [both, only_a, only_b, neither])
    b = np.repeat([1, 0, 1, 0], [both, only_a, only_b, neither])
    return a.astype(bool), b.astype(bool)


def _score_statistic(only_a: int, only_b: int, total: int, difference: float) -> float:
    """McNemar's score statistic with the restricted likelihood maximised by search."""

    def negative_log_likelihood(q: float) -> float:
        cells = np.array([q + difference, q, 1.0 - 2.0 * q - difference])
        counts = np.array([only_a, only_b, total - only_a - only_b])
        return -float(stats.multinomial.logpmf(counts, total, cells))

    low, high = max(0.0, -difference) + 1e-12, (1.0 - difference) / 2.0 - 1e-12
    q = optimize.minimize_scalar(
        negative_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}
    ).x
    spread = np.sqrt(total * (2.0 * q + difference - difference**2))
    return (only_a - only_b - total * difference) / spread


@pytest.mark.parametrize(("only_a", "only_b", "total"), [(12, 4, 100), (3, 9, 40), (20, 19, 449)])
def test_paired_difference_inverts_the_score_test(only_a: int, only_b: int, total: int) -> None:
    both = (total - only_a - only_b) // 2
    a, b = _vectors(both, only_a, only_b, total - only_a - only_b - both)
    interval = paired_difference(a, b)
    assert interval.value == pytest.approx((only_a - only_b) / total)
    z = stats.norm.ppf(0.975)
    assert _score_statistic(only_a, only_b, total, interval.low) == pytest.approx(z, abs=1e-4)
    assert _score_statistic(only_a, only_b, total, interval.high) == pytest.approx(-z, abs=1e-4)
    expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert interval.p_value == pytest.approx(expected, rel=1e-9)


def test_equal_vectors_have_an_interval_of_some_width_and_p_of_one() -> None:
    a, b = _vectors(90, 0, 0, 10)
    interval = paired_difference(a, b)
    # Without discordant pairs Tango's limits are +-z^2 / (n + z^2).
    half = stats.norm.ppf(0.975) ** 2 / (100 + stats.norm.ppf(0.975) ** 2)
    assert (interval.low, interval.high) == pytest.approx((-half, half), abs=1e-6)
    assert interval.p_value == 1.0


def test_paired_difference_covers_at_small_counts() -> None:
    generator = np.random.default_rng(5)
    total, truth, hits, trials = 60, 0.05, 0, 600
    for only_a, only_b, _ in generator.multinomial(total, [0.10, 0.05, 0.85], size=trials):
        interval = paired_difference(*_vectors(0, only_a, only_b, total - only_a - only_b))
        hits += interval.low <= truth <= interval.high
    assert 0.93 <= hits / trials <= 0.98  # binomial standard error 0.009


def test_paired_interval_is_the_crossed_anova_worked_out_by_scalars() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.random((4, 30)) < 0.8, generator.random((4, 30)) < 0.6
    d = a.astype(float) - b
    mean = d.sum() / 120
    ms_seed = sum(30 * (d[s].sum() / 30 - mean) ** 2 for s in range(4)) / 3
    ms_picture = sum(4 * (d[:, i].sum() / 4 - mean) ** 2 for i in range(30)) / 29
    ms_rest = (
        sum(
            (d[s, i] - d[s].sum() / 30 - d[:, i].sum() / 4 + mean) ** 2
            for s in range(4)
            for i in range(30)
        )
        / 87
    )
    assert ms_seed + ms_picture - ms_rest > max(ms_seed, ms_picture)  # the untruncated branch
    total = ms_seed + ms_picture - ms_rest
    degrees = total**2 / (ms_seed**2 / 3 + ms_picture**2 / 29 + ms_rest**2 / 87)
    half = stats.t.ppf(0.975, degrees) * np.sqrt(total / 120)
    interval = paired_interval(a, b)
    assert interval.value == pytest.approx(mean)
    assert (interval.low, interval.high) == pytest.approx((mean - half, mean + half), rel=1e-9)
    assert interval.degrees_of_freedom == pytest.approx(degrees)


@pytest.mark.parametrize(
    ("seed_spread", "picture_spread"), [(0.0, 0.0), (0.0, 0.4), (0.5, 0.2), (1.0, 1.0)]
)
def test_paired_interval_covers_over_pictures_and_seeds(
    seed_spread: float, picture_spread: float
) -> None:
    """Crossed logits: own effects of arm x seed and arm x picture; the truth is their mean."""
    generator = np.random.default_rng(11)
    seeds, pictures, trials, gap = 5, 200, 500, 0.5

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1.0 / (1.0 + np.exp(-x))

    # Population accuracy of each arm: Gauss-Hermite over the summed normal effects.
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    spread = np.hypot(np.hypot(seed_spread, picture_spread), 1.0)
    accuracy = [weights @ sigmoid(c + spread * nodes) / weights.sum() for c in (1.5, 1.5 - gap)]
    truth, hits = accuracy[0] - accuracy[1], 0
    for _ in range(trials):
        shared = generator.normal(size=(1, pictures))  # hard pictures are hard for both arms
        correct = []
        for centre in (1.5, 1.5 - gap):
            logits = centre + shared + seed_spread * generator.normal(size=(seeds, 1))
            logits = logits + picture_spread * generator.normal(size=(1, pictures))
            correct.append(generator.random((seeds, pictures)) < sigmoid(logits))
        interval = paired_interval(*correct)
        hits += interval.low <= truth <= interval.high
    assert 0.93 <= hits / trials <= 0.99  # binomial standard error 0.010


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(UserError, match="shapes"):
        paired_difference(np.ones(3), np.ones(4))
    with pytest.raises(UserError, match="paired_difference for one seed"):
        paired_interval(np.ones((1, 9)), np.zeros((1, 9)))
