"""The theory of pruned data against printed limits, quadrature and classifiers really fitted."""

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import expit

from etude.core.files import read_json, write_json_atomic
from etude.core.log import Log
from etude.core.recipe import load_recipe
from etude.jobs import run_recipe
from etude.practice import theory, theory_report
from etude.practice.theory import Cosines, Moments, Rule, best_ridge, grow, simulate

HARD, EASY, SOFT = Rule("hard", 0.3), Rule("easy", 0.4), Rule("soft", sharpness=1.5)


@pytest.mark.parametrize("rule", [HARD, EASY, SOFT, Rule("random", 0.3)])
@pytest.mark.parametrize("rho", [-0.4, 0.0, 0.3, 0.95, 0.99999])
def test_moments_are_the_expectations(rule: Rule, rho: float) -> None:
    def q(g: float) -> float:
        far = abs(g)
        if rule.kind == "soft":
            return (4 * expit(far) * expit(-far)) ** rule.sharpness
        if rule.kind == "random":
            return rule.keep
        return float((far <= rule.edge) == (rule.kind == "hard"))

    def mean(f) -> float:
        tau = rho / np.sqrt(1 - rho * rho)
        edge = rule.edge if rule.kind in ("hard", "easy") else 1.0
        cuts = sorted({0.0, 0.01, edge, -edge, 0.3, -0.3, -0.01})
        value, _ = integrate.quad(
            lambda g: f(g, tau) * stats.norm.pdf(g), -12, 12, points=cuts, limit=400
        )
        return value

    expected = Moments(
        mean(lambda g, tau: q(g)),
        mean(lambda g, tau: q(g) * g * g),
        2 * mean(lambda g, tau: q(g) * stats.norm.pdf(tau * g)) / np.sqrt(1 - rho * rho),
        2 * mean(lambda g, tau: q(g) * g * stats.norm.cdf(tau * g)),
    )
    found = vars(rule.moments(rho))
    assert found == pytest.approx(vars(expected), rel=1e-6, abs=1e-9)


def test_a_pruner_that_is_the_generator_is_the_limit() -> None:
    for rule in (HARD, EASY, SOFT, Rule()):
        near, at = vars(rule.moments(1 - 1e-12)), vars(rule.moments(1.0))
        assert at == pytest.approx(near, rel=1e-5)
    assert Rule("hard", 1.0).moments(0.6) == Rule().moments(0.6)


def printed(phi: float, rule: Rule, rho: float) -> float:
    """The limits of no ridge as the publication prints them, one for each side of the peak."""
    of, width = rule.moments(rho), np.sqrt(1 - rho * rho)
    p, gamma, along, beta = of.p, of.gamma, of.along, of.across * width
    if phi < p:
        a = (width * beta + rho * along * p / gamma) / (p - phi)
        b = (
            p * p * phi
            + p * (beta**2 + along**2 * ((p - phi) * p / gamma**2 + phi / gamma))
            - 2 * phi * (beta**2 + along**2 * p / gamma)
        )
        b /= (p - phi) ** 3
    else:
        c0, c1 = 1 - p / phi, 1 - (p - gamma) / phi
        a = c0 * (width * beta + rho * along / c1)
        b = c0 * (p * phi - beta**2 - along**2 / c1)
    return np.arccos(a / np.sqrt(b)) / np.pi


@pytest.mark.parametrize("rule", [HARD, EASY, SOFT, Rule("random", 0.5)])
def test_without_ridge_both_sides_of_the_peak_are_as_printed(rule: Rule) -> None:
    for rho in (0.2, 0.8, 0.999):
        cosines = Cosines.of_pruner(rho)
        phi = np.array([0.01, 0.1, 0.29, 0.31, 0.7, 2.0, 50.0])
        expected = [printed(value, rule, rho) for value in phi]
        for ridge in (0.0, 1e-14, 1e-300):
            found = theory.limit_error(phi, ridge, rule, cosines)
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        peak = theory.limit_error(rule.moments(rho).p, [0.0, 1e-16], rule, cosines)
        assert np.isfinite(peak).all() and (peak > 0.499).all()


def accuracies(sizes: np.ndarray, keeps: np.ndarray, rho: float) -> np.ndarray:
    """Per cent right of the best ridge in 512 dimensions, `sizes` examples left of size / keep."""
    found = []
    for size, keep in zip(*np.broadcast_arrays(sizes, keeps), strict=True):
        rule = Rule("hard", keep) if keep < 1 else Rule()
        found.append(100 - 100 * best_ridge(512 * keep / size, rule, Cosines.of_pruner(rho))[1])
    return np.array(found)


def test_values_computed_elsewhere() -> None:
    """Accuracies of keeping hard examples, from an implementation that shares no line with ours."""
    keeps = np.array([1, 0.5, 0.25, 0.1])
    for rho, size, expected in (
        (1.0, 1024, [81.4, 92.97, 96.63, 98.66]),
        (1.0, 4096, [91.2, 97.3, 98.7, 99.5]),
        (1.0, 256, [67.7, 59.7, 55.0, 52.0]),
        (0.9, 1024, [81.4, 88.1, 89.4, 89.8]),
        (0.9, 4096, [91.2, 95.2, 95.9, 96.0]),
    ):
        np.testing.assert_allclose(accuracies(size, keeps, rho), expected, atol=0.06)
    factors = np.array([1, 1.5, 2, 3, 4, 6, 9, 12, 18, 40])
    for rho, expected in (
        (0.95, [81.4, 88.2, 90.1, 91.5, 92.0, 92.3, 92.5, 92.5, 92.4, 90.9]),
        (0.8, [81.4, 84.4, 85.4, 86.0, 86.2, 86.3, 86.4, 86.4, 86.3, 84.5]),
    ):
        np.testing.assert_allclose(accuracies(1024, 1 / factors, rho), expected, atol=0.06)


def test_hard_examples_need_a_good_generator_and_plenty_of_data() -> None:
    """Errors of all, hard and easy examples at a fifth kept, of the same other implementation."""
    for quality, phi, expected in (
        (0.6, 0.05, (0.299, 0.308, 0.129)),
        (0.95, 0.005, (0.103, 0.099, 0.024)),
        (0.999, 0.05, (0.056, 0.021, 0.064)),
        (0.999, 0.5, (0.187, 0.468, 0.215)),
    ):
        cosines = Cosines(0.999 * quality, 0.999, quality)
        rules = (Rule(), Rule("hard", 0.2), Rule("easy", 0.2))
        found = [float(best_ridge(phi, rule, cosines)[1]) for rule in rules]
        assert found == pytest.approx(expected, abs=0.001)


def test_fitted_classifiers_have_the_error_of_the_limit() -> None:
    """z-scores of 18 settings, all kinds of rules and angles, on both sides of the peak."""
    scores = []
    angles = (Cosines.of_pruner(0.8), Cosines.of_pruner(1.0), Cosines(0.7, 0.9, 0.8))
    for number, rule in enumerate((HARD, EASY, SOFT)):
        for k, cosines in enumerate(angles):
            for n, ridge in ((1200, 1e-2), (160, 1.0 if k else 1e-3)):
                errors = simulate(240, n, ridge, rule, cosines, repeats=10, seed=10 * number + k)
                expected = float(theory.limit_error(240 / n, ridge, rule, cosines))
                scores.append((errors.mean() - expected) / (errors.std(ddof=1) / 10**0.5))
    assert np.abs(scores).max() < 4.5
    # A t statistic of 9 degrees has variance 9 / 7.
    assert 6.0 < np.square(scores).sum() * 7 / 9 < 40.0


def test_vectors_have_the_cosines_asked_for() -> None:
    for cosines in (Cosines(), Cosines(0.3, -0.5, 0.6), Cosines(1.0, 0.4, 0.4)):
        s, g, w = theory.directions(5, cosines)
        found = (s @ s, g @ g, w @ w, s @ g, s @ w, g @ w)
        assert found == pytest.approx((1, 1, 1, *vars(cosines).values()), abs=1e-12)
    with pytest.raises(ValueError, match="no three vectors have the cosines"):
        Cosines(1.0, 0.2, 0.9)


def test_practice_on_what_the_newest_classifier_finds_hard() -> None:
    """Means of 8 seeds: the adaptive pruner wins, the frozen one loses to any examples at last."""
    final = {
        arm: np.mean([grow(arm, margin=0.1, seed=seed) for seed in range(8)], axis=0)
        for arm in ("static", "frozen", "adaptive")
    }
    assert final["static"][0] == final["frozen"][0] == final["adaptive"][0]
    assert final["adaptive"][-1] < 0.025 < 0.05 < final["static"][-1] < 0.06 < final["frozen"][-1]
    assert final["frozen"][2] < final["static"][2]


def test_the_recipe_draws_its_figures_and_goes_on_where_it_was(tmp_path) -> None:
    fields = ["check.dimensions=40", "check.least=8", "check.most=8", "toy.seeds=2"]
    fields += ["check.phi=[0.3]", "check.keep=[0.5]", "toy.margins=[0.3]", "map_points=9"]
    recipe = load_recipe("practice/theory", fields)
    folder, result = run_recipe(recipe, root=tmp_path, quiet=True)
    assert result["settings"] == 12 and 1e-4 < result["p"] and result["largest_z"] < 6.0
    found = read_json(folder / "check.json")
    page = (folder / "page.html").read_text()
    assert "12 settings" in page and page.count("<svg") == 4
    write_json_atomic(folder / "check.json", {"of": found["of"], "rows": found["rows"][:5]})
    again = theory_report.check(recipe.check, recipe.seed, folder / "check.json", Log(None))
    assert again["rows"] == found["rows"]
    other = theory_report.check(recipe.check, 1, folder / "check.json", Log(None))
    assert other["rows"][0] != found["rows"][0]
    signs = np.sign(read_json(folder / "figures.json")["map"]["easy_less_hard"])
    assert signs[0, -1] < 0 < signs[-1, 0]  # a poor generator and little data; a good one, plenty
