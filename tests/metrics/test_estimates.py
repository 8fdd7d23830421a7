"""Estimates: draws, means of scores, files; and the influences that stand in for halves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from etude.core.errors import UserError
from etude.metrics import influences
from etude.metrics.comparing import error_of_contrast
from etude.metrics.estimates import Estimate
from etude.metrics.figures import mean_of_scores, measure
from etude.metrics.intervals import IntervalConfig
from etude.metrics.prdc import prdc
from etude.metrics.registry import METRICS, Pair
from etude.metrics.shortages import shortages
from etude.metrics.vendi import vendi_score

CONFIG = IntervalConfig(replicates=200)


def rows(seed: int, count: int, dim: int, scale: float = 1.0) -> torch.Tensor:
    drawn = np.random.default_rng(seed).normal(size=(count, dim))
    return torch.from_numpy(scale * drawn * (1.0 + np.arange(dim)) ** -0.5)


def test_draws_have_the_value_and_the_error_and_stay_together() -> None:
    real, a = rows(0, 300, 4), rows(1, 300, 4, 1.5)
    one, two = (
        next(iter(measure(Pair(real, x, "test"), "frechet", CONFIG).values()))
        for x in (a, a + 0.01)
    )
    draws = one.draws()
    assert draws.shape == (400,)
    assert draws.mean() == pytest.approx(one.value, rel=1e-9)
    assert np.sqrt(np.mean((draws - one.value) ** 2)) == pytest.approx(one.standard_error())
    assert np.corrcoef(draws, two.draws())[0, 1] > 0.99
    assert Estimate("x", 2.0).draws().shape == (0,)


def test_the_mean_of_scores_is_scipys_and_of_several_a_prompt_that_of_prompts() -> None:
    scores = np.random.default_rng(2).gamma(2.0, size=60)
    found = mean_of_scores("CLIPScore", scores, CONFIG)
    low, high = stats.t.interval(0.95, 59, scores.mean(), stats.sem(scores))
    interval = found.interval(CONFIG)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9)
    prompts = np.arange(60) % 20
    of_prompts = scores.reshape(3, 20).mean(0)
    clustered = mean_of_scores("CLIPScore", scores, CONFIG, prompts=prompts)
    assert clustered.standard_error() == pytest.approx(stats.sem(of_prompts), rel=1e-9)
    assert clustered.value == pytest.approx(scores.mean())
    # The halvings say the same, with their own noise.
    assert clustered.spread.variance("local") ** 0.5 == pytest.approx(
        clustered.standard_error(), rel=0.2
    )
    alone = mean_of_scores("CLIPScore", scores, CONFIG, prompts=np.zeros(60))
    assert alone.value == pytest.approx(scores.mean()) and alone.interval(CONFIG).low is None


def test_ends_stay_where_scores_can_be() -> None:
    scores = np.array([0.0, 1.0, 1.0, 1.0])  # the mean's own interval is -.05 to 1.55
    found = mean_of_scores("DSG", scores, CONFIG, at_least=0.0, at_most=1.0).interval(CONFIG)
    assert (found.low, found.high) == (0.0, 1.0)


def test_a_percentage_has_the_interval_of_its_share() -> None:
    rng = np.random.default_rng(5)
    halves = rng.binomial(100, 0.97, 40) / 100
    for share, drawn in ((0.97, halves), (1.0, np.ones(40))):
        whole = Estimate("precision", share, {0.5: drawn}, kind="local", count=200)
        percent = Estimate("AuthPct", 100 * share, {0.5: 100 * drawn}, kind="local", count=200)
        one, other = (estimate.interval(CONFIG) for estimate in (whole, percent))
        assert (other.low, other.high) == pytest.approx((100 * one.low, 100 * one.high))
        assert 0.9 < one.low < share and one.high <= 1.0 and other.low < 100.0
        errors = [error_of_contrast([(1.0, estimate)]) for estimate in (whole, percent)]
        assert errors[1].standard_error == pytest.approx(100 * errors[0].standard_error)


@pytest.mark.parametrize("name", ["frechet", "fd_infinity", "kid", "prdc", "vendi", "mind"])
def test_pictures_of_one_prompt_have_a_value_and_no_interval(name: str) -> None:
    pair = Pair(rows(0, 60, 3), rows(1, 60, 3), "test")
    alone = replace(pair, generated_prompts=torch.zeros(60, dtype=torch.int64))
    expected = measure(pair, name, CONFIG)
    for figure, found in measure(alone, name, CONFIG).items():
        assert found.value == expected[figure].value
        assert found.interval(CONFIG).method == "none"


def test_few_prompts_have_few_degrees_of_freedom() -> None:
    """Of two prompts every halving is the same, and its scatter says nothing."""
    prompts = torch.arange(60) % 2
    pair = Pair(rows(0, 60, 3), rows(1, 60, 3), "test", generated_prompts=prompts)
    (found,) = measure(pair, "kid", CONFIG).values()
    assert found.interval(CONFIG).degrees_of_freedom <= 1
    assert Estimate.from_bytes(found.to_bytes()).units == 2
    assert error_of_contrast([(1.0, found), (-0.5, found)]).degrees == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["frechet", "fd_infinity", "vendi"])
@pytest.mark.parametrize("fault", ["a dead feature", "one picture"])
def test_singular_sets_have_an_interval_where_rows_are_many(name: str, fault: str) -> None:
    """By influences: more than 64 dimensions, and halves with more rows than dimensions."""
    real, drawn = rows(2, 300, 70), rows(3, 300, 70)
    if fault == "a dead feature":
        real[:, 3] = drawn[:, 3] = 0.0
    else:
        drawn[:] = drawn[:1]
    for found in measure(Pair(real, drawn, "test"), name, CONFIG).values():
        interval = found.interval(CONFIG)
        assert interval.low - 1e-9 <= found.value <= interval.high + 1e-9


def test_a_dead_feature_changes_no_error() -> None:
    real, drawn = rows(4, 400, 70), 1.1 * rows(5, 400, 70)
    dead = [torch.cat([side, torch.zeros(400, 1, dtype=side.dtype)], 1) for side in (real, drawn)]
    (one,) = measure(Pair(real, drawn, "test"), "frechet", CONFIG).values()
    (two,) = measure(Pair(*dead, "test"), "frechet", CONFIG).values()
    assert two.value == pytest.approx(one.value, rel=1e-6)
    np.testing.assert_allclose(two.drawn - two.value, one.drawn - one.value, rtol=1e-4, atol=1e-7)


def test_halves_that_are_too_small_give_no_interval() -> None:
    pair = Pair(rows(0, 11, 3), rows(1, 11, 3), "test")
    found = measure(pair, "prdc", CONFIG)  # k = 5 needs six rows, and a half has five
    assert all(one.interval(CONFIG).method == "none" for one in found.values())
    with pytest.raises(UserError, match="prdc needs 6 pictures on each side and has 5"):
        measure(Pair(rows(0, 5, 3), rows(1, 11, 3), "test"), "prdc", CONFIG)
    logits = Pair(torch.zeros(0, 4), rows(2, 60, 4), "test/logits")
    for value in measure(logits, "inception_score", CONFIG).values():
        assert np.isfinite(value.value) and value.interval(CONFIG).low is None


def test_figures_of_generated_pictures_alone_do_not_look_at_the_real_side() -> None:
    logits = torch.from_numpy(np.random.default_rng(6).normal(size=(600, 4)))
    options = {"splits": 2}
    alone = Pair(torch.zeros(0, 4), logits, "test/logits", options)
    beside = replace(alone, real=torch.zeros(6, 4), real_labels=torch.arange(6))
    for name, pairs in (
        ("inception_score", (alone, beside)),
        ("vendi", [replace(one, options={}) for one in (alone, beside)]),
    ):
        (expected,), (found,) = (measure(pair, name, CONFIG).values() for pair in pairs)
        assert found.interval(CONFIG) == expected.interval(CONFIG)
        assert found.interval(CONFIG).low < found.value
    with pytest.raises(UserError, match="vendi needs 2 pictures and has 1"):
        measure(Pair(logits[:9], logits[:1], "test"), "vendi", CONFIG)


def test_options_are_the_metrics_own_or_a_mapping() -> None:
    pair = Pair(rows(0, 30, 3), rows(1, 30, 3, 1.5), "test")
    own = METRICS.get("prdc").options(k=3)
    none = IntervalConfig(replicates=0)
    by_hand = prdc(pair.real, pair.generated, 3)
    for options in (own, {"k": 3}):
        found = measure(replace(pair, options=options), "prdc", none)
        assert {name: one.value for name, one in found.items()} == by_hand
    assert by_hand != prdc(pair.real, pair.generated)
    for options, words in (
        ({"k": 0}, "options.k: .* got 0"),
        ({"n": 3}, "options.n: there is no such option; options has k, convention"),
        (METRICS.get("kid").options(), "the options are KidOptions, and PrdcOptions are needed"),
        (7, "the options are int"),
    ):
        with pytest.raises(UserError, match=words):
            measure(replace(pair, options=options), "prdc", none)


@pytest.mark.parametrize("name", ["real_labels", "generated_labels", "generated_prompts"])
@pytest.mark.parametrize("count", [29, 31])
def test_there_is_a_label_and_a_prompt_for_every_picture(name: str, count: int) -> None:
    numbers = {name: torch.zeros(count, dtype=torch.int64)}
    with pytest.raises(UserError, match=f"{name} has {count} numbers for 30 pictures"):
        Pair(rows(0, 30, 3), rows(1, 30, 3), "test", **numbers)


def test_scores_that_are_no_numbers_are_named() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(UserError, match=f"score 1 of CLIPScore is {bad}"):
            mean_of_scores("CLIPScore", [1.0, bad, 2.0], CONFIG)
    with pytest.raises(UserError, match="CLIPScore has 2 prompts for 3 scores"):
        mean_of_scores("CLIPScore", [1.0, 3.0, 2.0], CONFIG, prompts=[0, 1])


def test_files_give_everything_back() -> None:
    scores = mean_of_scores("score", np.arange(9.0), CONFIG, at_least=0.0, at_most=8.0)
    (other,) = measure(Pair(rows(0, 60, 3), rows(1, 60, 3), "test"), "kid", CONFIG).values()
    for one in (scores, other, Estimate("x", 0.1)):
        found = Estimate.from_bytes(one.to_bytes())
        assert (found.name, found.value, found.kind, found.count) == (
            one.name,
            one.value,
            one.kind,
            one.count,
        )
        assert (found.at_least, found.at_most) == (one.at_least, one.at_most)
        assert found.drawn_by == one.drawn_by
        assert np.array_equal(found.drawn, one.drawn)
        assert (found.errors is None) == (one.errors is None)
        assert found.interval(CONFIG) == one.interval(CONFIG)


def test_estimates_of_the_same_pictures_have_the_same_halves() -> None:
    real, a = rows(0, 60, 3), rows(1, 60, 3)
    labels = torch.arange(60) % 3
    drawn_by = {
        next(iter(measure(pair, "frechet", CONFIG, seed).values())).drawn_by
        for pair, seed in (
            (Pair(real, a, "test"), 0),
            (Pair(real[:40], a, "test"), 0),
            (Pair(real, a, "test"), 1),
            (Pair(real, a[:50], "test"), 0),
            (Pair(real, a, "test", generated_labels=labels), 0),
        )
    }
    assert len(drawn_by) == 4
    assert mean_of_scores("score", np.arange(60.0), CONFIG).drawn_by in drawn_by


def weighted_frechet(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """By definition, of weighted rows x; the last trace is a sum of singular values."""
    mean, gap = weights @ x, weights @ x - y.mean(0)
    one = (x - mean) * weights[:, None] ** 0.5
    two = (y - y.mean(0)) / len(y) ** 0.5
    roots = np.linalg.svd(one @ two.T, compute_uv=False)
    return gap @ gap + (one**2).sum() + (two**2).sum() - 2 * roots.sum()


@pytest.mark.parametrize(("counts", "dim"), [((40, 30), 5), ((12, 14), 20)])
def test_frechet_influences_are_derivatives_along_the_weights(counts, dim) -> None:
    x, y = rows(3, counts[0], dim), rows(4, counts[1], dim, 1.3) + 0.2
    ones = [torch.ones(len(side), dtype=torch.bool) for side in (x, y)]
    found = [psi.numpy() for psi in influences.of_frechet(x, y, *ones)]
    for (a, b), psi in (((x, y), found[0]), ((y, x), found[1])):
        a, b, n = a.numpy(), b.numpy(), len(a)
        even, moved = np.full(n, 1.0 / n), []
        for i in range(n):
            step = -even.copy()
            step[i] += 1.0
            ends = [weighted_frechet(a, b, even + s * 1e-5 * step) for s in (1, -1)]
            moved.append((ends[0] - ends[1]) / 2e-5)
        # The library divides by n - 1, here it is n: close, up to a constant.
        assert np.corrcoef(moved, psi)[0, 1] > 0.9995
        assert np.polyfit(psi - psi.mean(), moved, 1)[0] == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("q", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("block", [7, 4096])
def test_vendi_influences_are_derivatives_along_the_weights(q, block, monkeypatch) -> None:
    monkeypatch.setattr(influences, "_BLOCK", block)
    x = rows(7, 30, 4)
    psi = influences.of_vendi(x, torch.ones(30, dtype=torch.bool), q).numpy()
    units = (x / x.norm(dim=1, keepdim=True)).numpy()

    def log_score(weights: np.ndarray) -> float:
        values = np.linalg.eigvalsh(units.T @ (units * weights[:, None]))
        if q == 1:
            return -(values * np.log(values)).sum()
        return -np.log(values.max()) if np.isinf(q) else np.log((values**q).sum()) / (1 - q)

    even, moved = np.full(30, 1 / 30), []
    assert log_score(even) == pytest.approx(np.log(vendi_score(x, q)), rel=1e-9)
    for i in range(30):
        step = -even.copy()
        step[i] += 1.0
        moved.append((log_score(even + 1e-6 * step) - log_score(even - 1e-6 * step)) / 2e-6)
    assert moved - np.mean(moved) == pytest.approx(psi - psi.mean(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("metric", ["frechet", "vendi"])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_influences_give_the_spread_of_real_halves(metric, shift, monkeypatch) -> None:
    config, pairs = IntervalConfig(replicates=60), []
    for seed in range(6):
        real, drawn = rows(2 * seed, 300, 24), rows(2 * seed + 1, 300, 24) * (1 - shift / 2) + shift
        pairs.append(Pair(real, drawn, "test"))
    errors = []
    for few in (64, 8):  # halves as they are, then by influence
        monkeypatch.setattr("etude.metrics.figures._FEW_DIMENSIONS", few)
        found = [next(iter(measure(pair, metric, config).values())) for pair in pairs]
        errors.append([one.spread.variance(one.kind) ** 0.5 for one in found])
    ratio = np.array(errors[1]) / np.array(errors[0])
    assert 0.85 < ratio.mean() < 1.15
    assert METRICS.get(metric).influences is not None


def test_what_is_short_is_said_with_its_number() -> None:
    frechet, vendi = METRICS.get("frechet"), METRICS.get("vendi")
    found = shortages(frechet, frechet.options(), 2048, 10_000, 500)
    assert [(s.side, s.count, s.needed) for s in found] == [("generated", 500, 2049)]
    assert "singular" in str(found[0]) and "500 generated" in str(found[0])
    assert shortages(frechet, frechet.options(), 64, 100, 100) == []
    assert [s.side for s in shortages(vendi, vendi.options(), 8, 0, 20)] == ["generated"]
    prdc = METRICS.get("prdc")
    assert {s.needed for s in shortages(prdc, prdc.options(k=5), 8, 60, 60)} == {100}
