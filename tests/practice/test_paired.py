"""Intervals against their definitions, a direct likelihood search, and simulated coverage."""

import numpy as np
import pytest
from scipy import optimize, stats

from etude.core.errors import UserError
from etude.practice.paired import (
    accuracy_interval,
    compare_all,
    holm,
    paired_difference,
    paired_interval,
)


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
    # The interval whose level is 1 - p ends at zero.
    at_zero = paired_interval(a, b, level=1.0 - interval.p_value)
    assert min(abs(at_zero.low), abs(at_zero.high)) == pytest.approx(0.0, abs=1e-9)
    assert interval.p_value == pytest.approx(paired_interval(b, a).p_value)


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


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        # Worked by hand: (0.01 x 4, 0.02 x 3, then the larger of 0.06 and 0.03 x 2, 0.8).
        ([0.03, 0.01, 0.8, 0.02], [0.06, 0.04, 0.8, 0.06]),
        ([0.5, 0.6, 0.9], [1.0, 1.0, 1.0]),
        ([0.04], [0.04]),
        ([0.01, 0.01, 0.01], [0.03, 0.03, 0.03]),
        ([], []),
    ],
)
def test_holm_by_hand(p_values: list[float], adjusted: list[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


def test_holm_rejects_what_its_steps_reject() -> None:
    """The step-down rule itself: reject in ascending order while p <= alpha / (those left)."""
    generator = np.random.default_rng(3)
    for _ in range(200):
        p_values = generator.uniform(0, 0.2, generator.integers(1, 7)).tolist()
        alpha, rejected = generator.uniform(0.01, 0.3), set()
        for place in sorted(range(len(p_values)), key=p_values.__getitem__):
            if p_values[place] > alpha / (len(p_values) - len(rejected)):
                break
            rejected.add(place)
        assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


def test_several_arms_are_compared_as_pairs_at_a_stricter_level() -> None:
    generator = np.random.default_rng(8)
    correct = {
        name: generator.random((4, 60)) < p
        for name, p in zip("abcd", (0.8, 0.6, 0.75, 0.4), strict=True)
    }
    found = compare_all(correct, "b", level=0.94)
    assert list(found) == ["a", "c", "d"]
    for arm, interval in found.items():
        alone = paired_interval(correct["b"], correct[arm], level=0.98)
        assert (interval.value, interval.low, interval.high, interval.level, interval.p_value) == (
            alone.value,
            alone.low,
            alone.high,
            pytest.approx(0.98),
            alone.p_value,
        )
    assert found["a"].value < 0 < found["d"].value  # b minus a, which is better, and minus d
    adjusted = [interval.adjusted_p_value for interval in found.values()]
    assert adjusted == pytest.approx(holm([interval.p_value for interval in found.values()]))
    one_seed = compare_all({name: rows[0] for name, rows in correct.items()}, "a", level=0.94)
    alone = paired_difference(correct["a"][0], correct["d"][0], level=0.98)
    assert (one_seed["d"].low, one_seed["d"].high) == pytest.approx((alone.low, alone.high))
    as_matrix = compare_all({name: rows[:1] for name, rows in correct.items()}, "a", level=0.94)
    assert as_matrix == one_seed


def test_all_intervals_hold_at_once_and_holm_errs_no_more_than_it_says() -> None:
    """Three arms as good as the reference but one: seeds and pictures are shared by all arms."""
    generator = np.random.default_rng(21)
    seeds, pictures, trials, level = 5, 100, 400, 0.9
    accuracy = {"reference": 0.7, "equal": 0.7, "also equal": 0.7, "worse": 0.5}
    held, erred, found_worse = 0, 0, 0
    for _ in range(trials):
        hard = generator.normal(size=(1, pictures))
        correct = {}
        for name, share in accuracy.items():
            luck = (
                hard
                + 0.3 * generator.normal(size=(seeds, 1))
                + generator.normal(size=(seeds, pictures))
            )
            correct[name] = luck < stats.norm.ppf(share) * np.sqrt(2.09)
        found = compare_all(correct, "reference", level)
        held += all(
            interval.low <= accuracy["reference"] - accuracy[name] <= interval.high
            for name, interval in found.items()
        )
        erred += min(found["equal"].adjusted_p_value, found["also equal"].adjusted_p_value) <= 0.1
        found_worse += found["worse"].adjusted_p_value <= 0.1
    assert held / trials >= 0.87  # 0.9 less two binomial standard errors of 0.015
    assert erred / trials <= 0.13
    assert found_worse / trials > 0.5


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UserError, match="'x' cannot be compared within arms a, b"):
        compare_all({"a": np.ones(4), "b": np.ones(4)}, "x")
    with pytest.raises(UserError, match="one of at least two arms"):
        compare_all({"a": np.ones(4)}, "a")
    with pytest.raises(UserError, match="shapes"):
        compare_all({"a": np.ones((2, 4)), "b": np.ones((3, 4))}, "a")


def test_arms_that_never_differ_have_a_p_of_one() -> None:
    same = np.ones((2, 6))
    assert paired_interval(same, same).p_value == 1.0
    assert paired_interval(same, 0 * same).p_value == 0.0


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(UserError, match="shapes"):
        paired_difference(np.ones(3), np.ones(4))
    with pytest.raises(UserError, match="paired_difference for one seed"):
        paired_interval(np.ones((1, 9)), np.zeros((1, 9)))
