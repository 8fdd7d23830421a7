"""Coverage of the intervals by simulation with a known truth, and the pieces they are made of.

The truth is the mean of the figure over many fresh draws of both sides. Every case is a fixed
sequence of draws, so the tests are deterministic; bounds leave three standard deviations of the
number of trials to the nominal 90%. benchmarks/calibration.py is the long version.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

from etude.metrics.figures import measure
from etude.metrics.frechet import frechet_distance
from etude.metrics.intervals import (
    IntervalConfig,
    Spread,
    halves,
    interval,
    proportion,
    quantile,
)
from etude.metrics.registry import METRICS, Pair

TRIALS, LEVEL = 60, 0.9
CONFIG = IntervalConfig(level=LEVEL, replicates=40)
CLASSES = 5


def gaussians(rows: int, dim: int, shift: float) -> Callable[[np.random.Generator], Pair]:
    def draw(rng: np.random.Generator) -> Pair:
        real = torch.from_numpy(rng.normal(size=(rows, dim)))
        other = rng.normal(size=(rows, dim)) * (1 - shift / 3) + 2 * shift / dim**0.5
        return Pair(real, torch.from_numpy(other), "test")

    return draw


def classes_in_turn(rows: int) -> Callable[[np.random.Generator], Pair]:
    labels = torch.arange(rows) % CLASSES
    places = np.random.default_rng(0).normal(size=(CLASSES, 4)) * 4

    def draw(rng: np.random.Generator) -> Pair:
        one, two = (torch.from_numpy(places[labels] + rng.normal(size=(rows, 4))) for _ in "ab")
        return Pair(one, two * 1.1, "test", real_labels=labels, generated_labels=labels)

    return draw


CASES = {
    "equal": gaussians(120, 6, 0.0),
    "apart": gaussians(200, 4, 0.4),
    "classes": classes_in_turn(200),
}


def value(metric: str, pair: Pair) -> dict[str, float]:
    found = METRICS.get(metric).values(pair, 1.0, *pair.everything())
    return {name: float(values[0]) for name, values in found.items()}


@cache
def truth(metric: str, case: str) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each figure over 200 fresh draws."""
    rng = np.random.default_rng(1)
    drawn = [value(metric, CASES[case](rng)) for _ in range(200)]
    return {n: (np.mean([d[n] for d in drawn]), np.std([d[n] for d in drawn])) for n in drawn[0]}


@pytest.mark.parametrize(
    ("metric", "case"),
    [
        ("frechet", "equal"),
        ("frechet", "classes"),
        ("kid", "equal"),
        ("kid", "apart"),
        ("prdc", "equal"),
        ("prdc", "apart"),
    ],
)
def test_intervals_cover_the_expected_value(metric: str, case: str) -> None:
    expected, rng = truth(metric, case), np.random.default_rng(3)
    hits: dict[str, list[bool]] = {name: [] for name in expected}
    widths: dict[str, list[float]] = {name: [] for name in expected}
    for trial in range(TRIALS):
        for name, estimate in measure(CASES[case](rng), metric, CONFIG, seed=trial).items():
            found, (mean, deviation) = estimate.interval(CONFIG), expected[name]
            hits[name].append(found.low <= mean <= found.high)
            widths[name].append((found.high - found.low) / (2 * 1.645 * deviation))
    for name in expected:
        assert np.mean(hits[name]) > LEVEL - 0.12, name
        # Right, and not by being useless: near the width that knowing the spread would give. At
        # equality a distance may be far above the value drawn, and the interval says so.
        most = 2.0 if case == "equal" and metric == "kid" else 1.6
        assert 0.8 < np.median(widths[name]) < most, name


def test_the_naive_bootstrap_would_not() -> None:
    mean, rng, hits = truth("frechet", "equal"), np.random.default_rng(4), []
    for _ in range(15):
        pair = CASES["equal"](rng)
        drawn = [
            frechet_distance(
                *(side[rng.integers(0, 120, 120)] for side in (pair.real, pair.generated))
            )
            for _ in range(40)
        ]
        low, high = np.quantile(drawn, [0.05, 0.95])
        hits.append(low <= next(iter(mean.values()))[0] <= high)
    assert np.mean(hits) < 0.3


def test_class_shares_that_are_fixed_do_not_widen_the_interval() -> None:
    pair = CASES["classes"](np.random.default_rng(5))
    blind = Pair(pair.real, pair.generated, "test")
    (fixed,) = measure(pair, "frechet", CONFIG).values()
    (drawn,) = measure(blind, "frechet", CONFIG).values()
    assert drawn.standard_error() > 1.3 * fixed.standard_error()


def test_pictures_of_one_prompt_are_not_independent() -> None:
    rng = np.random.default_rng(6)
    prompts = torch.arange(40).repeat_interleave(5)
    drawn = torch.from_numpy(3.0 + rng.normal(size=(40, 2)))[prompts] + 0.01 * torch.from_numpy(
        rng.normal(size=(200, 2))
    )
    real = torch.from_numpy(rng.normal(size=(2000, 2)))
    errors = [
        next(iter(measure(pair, "frechet", CONFIG).values())).standard_error()
        for pair in (
            Pair(real, drawn, "test"),
            Pair(real, drawn, "test", generated_prompts=prompts),
        )
    ]
    # Five copies of 40 pictures know what 40 know: the error is 5^(1/2) times as large.
    assert errors[1] / errors[0] == pytest.approx(5**0.5, rel=0.25)


def test_halves_of_a_mean_give_its_textbook_variance() -> None:
    x = torch.from_numpy(np.random.default_rng(7).exponential(size=300))
    split = halves(300, 4000, seed=0).double()
    spread = Spread.of(float(x.mean()), (split @ x / 150).numpy())
    assert spread.variance("local") == pytest.approx(float(x.var()) / 300, rel=0.07)
    assert spread.second_order() < 1e-20


def test_a_degenerate_figure_has_only_a_second_order_part() -> None:
    # |mean of x|^2 less its bias, for normals of mean 0 in 20 dimensions: variance
    # 20 * 2 / (n (n - 1)), all of it c.
    n, dim, found = 200, 20, []
    for seed in range(30):
        x = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, dim)))
        split = torch.cat([torch.ones(1, n), halves(n, 100, seed).float()]).double()
        count = split.sum(1)
        sums = (split @ x).square().sum(1) - split @ x.square().sum(1)
        pairs = sums / (count * (count - 1))
        found.append(Spread.of(float(pairs[0]), pairs[1:].numpy()))
    exact = 2 * dim / (n * (n - 1))
    assert np.mean([s.second_order() for s in found]) == pytest.approx(exact, rel=0.07)
    assert np.mean([np.mean(s.half**2) for s in found]) == pytest.approx(2 * exact, rel=0.2)
    assert 0.95 * exact < np.mean([s.variance("smooth") for s in found]) < 1.5 * exact


@pytest.mark.parametrize("distance", [0.0, 1.0, 3.0])
def test_a_squared_normal_is_covered_at_every_distance(distance: float) -> None:
    # T = (Z + d)^2 with expected value 1 + d^2. Its halvings have E L^2 = 4 T, and D is a squared
    # normal: quantiles of chi-square stand for many halvings.
    middle = stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, 1)

    def covers(t: float) -> bool:
        half = np.full(4000, 2 * t**0.5)
        drawn = np.concatenate([t + middle + half, t + middle - half])
        config = IntervalConfig()
        found = interval("x", t, drawn, config, kind="distance")
        return found.low <= 1 + distance**2 <= found.high

    grid = np.linspace(1e-3, (distance + 5) ** 2, 200)
    chance = np.diff(stats.ncx2.cdf(grid, 1, distance**2 + 1e-12), prepend=0)
    covered = sum(p for t, p in zip(grid, chance, strict=True) if covers(t))
    assert 0.93 < covered < 0.97


def test_halves_have_the_right_size_and_are_reproducible() -> None:
    split = halves(101, 50, seed=7)
    assert split.shape == (100, 101)
    assert torch.equal(split[:50].sum(1), torch.full((50,), 50))
    assert torch.equal(split[50:], ~split[:50])
    assert torch.equal(split, halves(101, 50, seed=7))
    assert not torch.equal(split, halves(101, 50, seed=7, side=1))
    assert not torch.equal(split, halves(101, 50, seed=8))
    # Every row is in a half equally often, binomially; so is every pair, once in four times.
    assert abs(float(split[:50].float().mean(0).std()) - (0.25 / 50) ** 0.5) < 0.02
    many = halves(20, 4000, seed=1)[:4000].double()
    together = many.T @ many / 4000
    off = together[~torch.eye(20, dtype=torch.bool)]
    assert float((off - 10 * 9 / (20 * 19)).abs().max()) < 0.035


def test_strata_are_halved_and_clusters_stay_together() -> None:
    strata = torch.tensor([4] * 10 + [1] * 30 + [2] * 60)[torch.arange(100) * 37 % 100]
    split = halves(100, 20, seed=0, strata=strata)
    for stratum, rows in ((4, 5), (1, 15), (2, 30)):
        assert torch.equal(split[:, strata == stratum].sum(1), torch.full((40,), rows))
    split = halves(100, 20, seed=0, clusters=torch.arange(100) % 20)
    for first in range(20):
        assert torch.equal(split[:, first], split[:, first + 40])
    assert torch.equal(split.sum(1), torch.full((40,), 50))


ROWS = torch.arange(103)


@pytest.mark.parametrize("kind", ["strata", "clusters"])
@pytest.mark.parametrize("group", [0 * ROWS, ROWS * 37 % 7, ROWS % 23, ROWS])
def test_quarters_are_the_halves_halved(kind: str, group: torch.Tensor) -> None:
    found = halves(103, 50, seed=3, **{kind: group}, quartered=True)
    a, b, c, d = found.split(50)
    assert torch.equal(a.int() + b.int() + c.int() + d.int(), torch.ones(50, 103).int())
    assert torch.equal(torch.cat([a | b, c | d]), halves(103, 50, seed=3, **{kind: group}))
    of_group = torch.stack([found[:, group == one].sum(1) for one in group.unique()], dim=1)
    sizes = group.unique(return_counts=True)[1]
    if kind == "clusters":
        assert ((of_group == 0) | (of_group == sizes)).all()
        of_group, sizes = (of_group > 0).sum(1, keepdim=True), torch.tensor([len(sizes)])
    assert (of_group - sizes / 4).abs().max() < 1


@pytest.mark.parametrize("falls", [0.0, 0.5, 1.0])
def test_quarters_say_how_the_variance_falls(falls: float) -> None:
    """Var(n) = n^-falls: half of the difference of two parts has half the variance of a part."""
    rng, n = np.random.default_rng(8), 400
    parts = {k: rng.normal(size=40_000) * ((n / k) ** -falls / 2) ** 0.5 for k in (2, 4)}
    spread = Spread(parts[2], np.zeros(40_000), quarter=parts[4])
    assert spread.variance("concentrated") == pytest.approx(n**-falls, rel=0.04)
    # By the delta method, of a square of a mean of squares of normals over another.
    few = Spread(parts[2][:100], np.zeros(100), quarter=parts[4][:200])
    assert few.degrees("concentrated") == pytest.approx(2 / (4 * 2 / 100 + 2 / 200), rel=0.35)


def test_the_error_of_a_concentrated_share_is_that_of_fresh_draws() -> None:
    """A collapsed model's AuthPct hangs on the training pictures beside it, and falls slowly."""

    def draw(rng: np.random.Generator) -> Pair:
        train, drawn = (torch.from_numpy(rng.normal(size=(200, 8))) for _ in "ab")
        return Pair(train, 0.4 * drawn + 0.5, "inception")

    def share(pair: Pair) -> float:
        own = torch.cdist(pair.real, pair.real).fill_diagonal_(torch.inf).min(1).values
        distance, train = torch.cdist(pair.generated, pair.real).min(1)
        return 100 * float((distance > own[train]).double().mean())

    rng = np.random.default_rng(9)
    deviation = np.std([share(draw(rng)) for _ in range(400)])
    errors: dict[str, list[float]] = {"concentrated": [], "local": []}
    for trial in range(30):
        (found,) = measure(draw(rng), "authenticity", CONFIG, seed=trial).values()
        for kind, of in errors.items():
            of.append(replace(found, kind=kind).standard_error() ** 2)
    assert np.mean(errors["concentrated"]) ** 0.5 == pytest.approx(deviation, rel=0.1)
    assert np.mean(errors["local"]) ** 0.5 < 0.9 * deviation


def test_a_proportion_has_wilsons_interval() -> None:
    # Wilson (1927): 8 of 10 at 95% gives 0.4902 to 0.9433.
    found = proportion(0.8, 10, IntervalConfig())
    assert (found.low, found.high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )
    everything = proportion(1.0, 10, IntervalConfig())
    assert everything.high == 1.0 and everything.low == pytest.approx(0.7225, abs=1e-4)
    assert everything.standard_error == pytest.approx(((12 / 14) * (2 / 14) / 10) ** 0.5)
    assert found.standard_error == pytest.approx(0.016**0.5)


def test_quantiles_are_students() -> None:
    # Student's tables: 2.228 for 10 degrees at 95%; the normal's 1.960.
    assert quantile(0.95, 10) == pytest.approx(2.228, abs=5e-4)
    assert quantile(0.95) == pytest.approx(1.960, abs=5e-4)


def test_no_replicates_give_no_interval() -> None:
    found = interval("x", 1.0, np.zeros(0), IntervalConfig(replicates=0))
    assert (found.value, found.low, found.high) == (1.0, None, None)


def test_odd_and_single_strata_are_halved_at_random() -> None:
    alone = halves(100, 200, 0, 0, torch.arange(100))[:200]
    assert len({tuple(one.tolist()) for one in alone}) == 200
    assert set(alone.sum(1).tolist()) == {50}
    threes = torch.arange(90) % 30
    found = halves(90, 400, 0, 0, threes)[:400]
    kept = torch.stack([found[:, threes == one].sum(1) for one in range(30)], dim=1)
    assert set(kept.flatten().tolist()) == {1, 2} and set(found.sum(1).tolist()) == {45}
    # Of 400 halvings a fair stratum keeps two rows in 200, with a deviation of 10.
    assert ((kept == 2).sum(0) - 200).abs().max() < 45


def test_rounding_noise_is_no_second_order() -> None:
    half = np.random.default_rng(0).normal(size=200) * 0.3
    for value in (3.7, 12.345):  # (v + h + v - h) / 2 - v is not 0 for the second
        drawn = np.concatenate([value + half, value - half])
        found = interval("FID", value, drawn, IntervalConfig(), kind="distance", at_least=0.0)
        assert found.high - value == pytest.approx(value - found.low, rel=1e-9)
