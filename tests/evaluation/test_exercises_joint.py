"""Probabilities and decisions of the exercises against scipy, brute force, formulas, simulation."""

import copy
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from etude.evaluation.exercises.gaps import decide, findings, gap_interval
from etude.evaluation.exercises.joint import (
    Joint,
    beats,
    decisions,
    dominance,
    front_decided,
    front_probability,
    interval_of,
    joint_draws,
    kendall_tau,
    on_front,
    rank_bounds,
    rank_distribution,
    tau_bounds,
)
from etude.evaluation.exercises.names import Figure
from etude.evaluation.results import Results, Row
from etude.metrics.estimates import Estimate


def gaussian(values: list[float], errors: list[float], count: int, seed: int = 0) -> Joint:
    """Independent Gaussian draws around values."""
    rng = np.random.default_rng(seed)
    mean, error = np.array(values)[:, None], np.array(errors)[:, None]
    draws = mean + error * rng.standard_normal((len(values), count))
    return Joint(np.array(values), draws, np.ones(len(values), dtype=bool))


def brute_front(points: list[tuple[float, ...]]) -> list[bool]:
    """By definition, one comparison at a time; larger is better."""

    def dominates(a: tuple, b: tuple) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and a != b

    return [not any(dominates(other, one) for other in points) for one in points]


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_kendall_tau_is_scipys(ties: bool) -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        count = int(rng.integers(2, 12))
        a, b = (rng.integers(0, 4, count) if ties else rng.normal(size=count) for _ in range(2))
        found, expected = kendall_tau(a, b), stats.kendalltau(a, b).statistic
        assert math.isnan(found) == math.isnan(expected)
        assert math.isnan(found) or found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("figures", [2, 3])
def test_fronts_are_those_of_the_definition(figures: int) -> None:
    rng = np.random.default_rng(2)
    for count in (1, 2, 7, 12):
        for _ in range(8):
            values = rng.integers(0, 6, (figures, count)).astype(float)  # with equal points
            expected = brute_front([tuple(point) for point in values.T])
            assert on_front(values).tolist() == expected
            for (i, a), (j, b) in itertools.product(enumerate(values.T), repeat=2):
                beaten = all(a >= b) and tuple(a) != tuple(b)
                assert dominance(values[:, :, None])[i, j] == beaten


def test_the_probability_to_be_larger_is_that_of_gaussians() -> None:
    errors = [0.5, 0.3, 0.2]
    joint = gaussian([1.0, 1.4, 2.0], errors, 40_000)
    found = beats(joint)
    for i, j in itertools.permutations(range(3), 2):
        difference, error = joint.values[i] - joint.values[j], math.hypot(errors[i], errors[j])
        assert found[i, j] == pytest.approx(stats.norm.cdf(difference / error), abs=0.01)
    assert np.diag(found) == pytest.approx(0.5)


def test_an_error_that_two_figures_share_cancels() -> None:
    rng = np.random.default_rng(3)
    shared, own = rng.standard_normal(40_000), 0.1 * rng.standard_normal((2, 40_000))
    values = np.array([1.0, 1.1])
    joint = Joint(values, values[:, None] + shared + own, np.ones(2, dtype=bool))
    expected = stats.norm.cdf(0.1 / (0.1 * 2**0.5))  # not 0.53, as of independent errors
    assert beats(joint)[1, 0] == pytest.approx(expected, abs=0.01)


def test_dominance_and_fronts_of_two_gaussian_points() -> None:
    first = gaussian([0.0, 0.3], [0.4, 0.5], 60_000, seed=4)
    second = gaussian([1.0, 0.6], [0.3, 0.4], 60_000, seed=5)
    draws = np.stack([first.draws, second.draws])
    ahead = stats.norm.cdf(0.3 / math.hypot(0.4, 0.5)), stats.norm.cdf(-0.4 / 0.5)
    found, front = dominance(draws), front_probability(draws)
    assert found[1, 0] == pytest.approx(ahead[0] * ahead[1], abs=0.008)
    assert found[0, 1] == pytest.approx((1 - ahead[0]) * (1 - ahead[1]), abs=0.008)
    assert front == pytest.approx([1 - ahead[0] * ahead[1], 1 - found[0, 1]], abs=0.008)


def test_draws_of_an_interval_have_its_ends_as_quantiles() -> None:
    rows = [
        Row("a", "d", "FID", 10.0, "lower", low=9.0, high=12.0),
        Row("b", "d", "FID", 10.0, "lower", low=9.0, high=12.0),
        Row("c", "d", "FID", 5.0, "lower"),
    ]
    joint = joint_draws(Results(tuple(rows)), rows)
    assert joint.known.tolist() == [True, True, False]
    for draws in joint.draws[:2]:
        share = np.array([(draws < 9.0).mean(), (draws < 10.0).mean(), (draws > 12.0).mean()])
        error = np.sqrt(np.array([0.025 * 0.975, 0.25, 0.025 * 0.975]) / len(draws))
        assert (np.abs(share - [0.025, 0.5, 0.025]) < 4 * error).all()
    assert abs(np.corrcoef(joint.draws[:2])[0, 1]) < 4 / joint.draws.shape[1] ** 0.5
    assert np.array_equal(joint.draws, joint_draws(Results(tuple(rows)), rows).draws)
    assert interval_of(rows[0], joint.draws[0], 0.95) == (9.0, 12.0)
    assert interval_of(rows[2], joint.draws[2], 0.95) is None
    low, high = interval_of(rows[0], joint.draws[0], 0.8)
    assert high - low == pytest.approx(2 * 1.2816 * joint.draws[0].std(ddof=1), rel=1e-4)


def estimated(values: dict[str, float], drawn_by: list[str], own: float) -> Results:
    """Densities of standard error 1 that share all of it but a part `own`, on 200 halvings."""
    rng = np.random.default_rng(6)
    shared, rows, estimates = rng.standard_normal(200), [], {}
    for (name, value), halves in zip(values.items(), drawn_by, strict=True):
        error = shared + own * rng.standard_normal(200)
        drawn = {0.5: value + np.concatenate([error, -error])}
        estimates[name] = Estimate("density", value, drawn, kind="local", drawn_by=halves)
        rows.append(Row(name, "d", "density", value, "higher", estimate=name))
    return Results(tuple(rows), estimates)


def test_draws_of_estimates_stay_together_where_their_halves_are_equal() -> None:
    results = estimated({"a": 3.0, "b": 3.0, "c": 3.0}, ["x", "x", "other halves"], 0.01)
    joint = joint_draws(results, results.rows)
    correlation = np.corrcoef(joint.draws)
    assert joint.known.all()
    assert correlation[0, 1] > 0.999 and abs(correlation[0, 2]) < 0.2
    for place, row in enumerate(results.rows):
        assert sorted(joint.draws[place]) == sorted(results.estimate(row).draws())
        assert joint.draws[place].std() == pytest.approx(1.0, abs=0.15)


def test_a_pair_is_decided_by_the_error_of_its_difference() -> None:
    """0.05 apart with standard errors of 1 each, of which the halves share all but 0.01."""
    for drawn_by, expected in ((["x", "x"], 1), (["x", "other halves"], 0)):
        results = estimated({"a": 3.05, "b": 3.0}, drawn_by, 0.01)
        joint = joint_draws(results, results.rows)
        (decided,) = decisions([joint], 0.95)
        assert decided[0, 1] == expected and decided[1, 0] == -expected
        assert beats(joint)[0, 1] == pytest.approx(1.0 if expected else 0.51, abs=0.05)


def test_rank_probabilities_count_scipys_ranks() -> None:
    joint = gaussian([1.0, 1.2, 0.4, 1.2], [0.3, 0.2, 0.5, 0.2], 3000)
    drawn = stats.rankdata(-joint.draws, axis=0, method="min")
    expected = np.stack([(drawn == rank).mean(1) for rank in range(1, 5)], axis=1)
    assert rank_distribution(joint) == pytest.approx(expected)
    alike = rank_distribution(gaussian([2.0] * 3, [0.1] * 3, 30_000))
    assert alike == pytest.approx(np.full((3, 3), 1 / 3), abs=0.012)


def test_what_has_no_error_is_never_decided() -> None:
    values = np.array([1.0, 9.0, 5.0])
    joint = Joint(values, np.repeat(values[:, None], 2, 1), np.array([False, False, True]))
    (decided,) = decisions([joint], 0.95)
    assert not decided.any()
    assert rank_bounds(decided) == [(1, 3)] * 3
    assert tau_bounds(decided, decided) == (-1.0, 1.0)


def test_intervals_of_tau_and_ranks_cover_where_quantiles_of_draws_do_not() -> None:
    """Close models under two figures: the truth is tau = 1 and the order 1 to 5."""
    rng, truth, repeats = np.random.default_rng(8), 0.6 * np.arange(5.0), 300
    tau_held = ranks_held = quantiles_held = 0
    for _ in range(repeats):
        columns = []
        for _ in range(2):
            values = truth + rng.standard_normal(5)
            draws = values[:, None] + rng.standard_normal((5, 200))
            columns.append(Joint(values, draws, np.ones(5, dtype=bool)))
        decided = decisions(columns, 0.95)
        tau_held += tau_bounds(*decided)[1] == 1.0
        bounds = rank_bounds(decided[0])
        ranks_held += all(low <= 5 - k <= high for k, (low, high) in enumerate(bounds))
        taus = [kendall_tau(columns[0].draws[:, r], columns[1].draws[:, r]) for r in range(60)]
        quantiles_held += np.quantile(taus, 0.975) >= 1.0
    assert tau_held >= 0.95 * repeats and ranks_held >= 0.95 * repeats
    assert quantiles_held < 0.5 * repeats


@pytest.mark.parametrize("apart", [0.0, 1.0, 4.0], ids=["equal", "near", "far"])
def test_the_interval_of_the_gap_covers_the_true_gap(apart: float) -> None:
    rng, repeats = np.random.default_rng(9), 400
    truth, held = np.array([0.0, 0.0, apart / 2, apart]), 0
    for _ in range(repeats):
        values = truth + rng.standard_normal(4)
        draws = values[:, None] + rng.standard_normal((4, 200))
        low, high, _ = gap_interval(Joint(values, draws, np.ones(4, dtype=bool)), 0.95)
        held += low <= apart <= high
    assert held >= 0.95 * repeats


def test_equal_groups_are_seldom_called_worse_in_a_whole_table() -> None:
    """16 models of four equal groups: corrected model by model, half of the tables have a worse."""
    rng, groups, figure = np.random.default_rng(10), list("abcd"), Figure("FID", "", "FID", "lower")
    wrong = {"holm": 0, "bonferroni": 0, "by model": 0}
    for _ in range(50):
        joints = [gaussian(rng.normal(size=4).tolist(), [1.0] * 4, 200, k) for k in range(16)]
        plain = [(figure, findings(joint, figure, groups, 0.95)) for joint in joints]
        for correction in wrong:
            found = copy.deepcopy(plain)
            together = [[one] for one in found] if correction == "by model" else [found]
            for some in together:
                decide(some, 0.95, correction if correction != "by model" else "holm")
            verdicts = [d["verdict"] for _, of in found for d in of["differences"]]
            wrong[correction] += set(verdicts) != {"not decided"}
    most = stats.binom.ppf(0.99, 50, 0.05)
    assert max(wrong["holm"], wrong["bonferroni"]) <= most < 15 < wrong["by model"]


def test_equal_models_are_seldom_decided_off_the_front() -> None:
    # Figures of eight equal models, each with its own error of 1: shares of draws fall below 0.05
    # for some of them in about every second table; decisions hold in 95 of 100.
    generator = np.random.default_rng(5)
    wrong = by_draws = 0
    for _ in range(100):
        values = generator.normal(size=(2, 8))
        draws = values[:, :, None] + generator.normal(size=(2, 8, 400))
        joints = [Joint(v, d, np.ones(8, bool)) for v, d in zip(values, draws, strict=True)]
        wrong += "off" in front_decided(decisions(joints, 0.95))
        by_draws += bool((front_probability(draws) <= 0.05).any())
    assert wrong <= 5 < 20 < by_draws


def test_a_front_is_decided_by_every_figure_of_it() -> None:
    values = np.array([[3.0, 2.0, 1.0, 2.95], [1.0, 2.0, 0.5, 0.98]])
    draws = values[:, :, None] + np.random.default_rng(0).normal(0, 0.05, (2, 4, 500))
    joints = [Joint(v, d, np.ones(4, bool)) for v, d in zip(values, draws, strict=True)]
    # 0 and 1 trade off; 2 is beaten by both; 3 cannot be told from 0 in either figure.
    assert front_decided(decisions(joints, 0.95)) == ["open", "on", "off", "open"]
