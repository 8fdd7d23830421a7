"""Probabilities and decisions about several figures at once; called by every exercise.

A draw is one set of values that the figures could have had, given how they were measured: their
values plus one joint replicate of their errors (metrics/estimates.py). Estimates of equal subsets
are drawn together, so what they share, as the reference, cancels in their differences. A share of
draws is a probability in the sense of a confidence distribution: of two Gaussian figures with
difference d and standard error s of it, the first is larger with probability Phi(d / s).

Draws around values that are already noisy scatter twice. Ranks and Kendall's tau of draws are
therefore drawn towards disorder, and their quantiles exclude the truth far more often than stated
(tests/evaluation/test_exercises_joint.py measures it). Intervals of ranks and of tau come from
decisions instead: which pairs differ, by tests with Holm's correction over all of them. All
decided signs are right at once with at least the stated probability, and then the truth lies among
the orders that agree with them (Mogstad, Romano, Shaikh and Wilhelm 2024 for ranks).
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtri

from etude.core.rng import Stream, normal, permute
from etude.metrics.comparing import Error, error_of_contrast, level_of_each, tested, with_holm
from etude.metrics.estimates import Estimate
from etude.metrics.intervals import PROPORTIONS, Interval

from ..results import Results, Row

Tests = dict[tuple[int, int], Interval]  # of pairs of figures, the first minus the second
UNLIMITED = (-math.inf, math.inf)
DRAWS = 2000  # of figures that come with an interval alone


@dataclass(frozen=True)
class Joint:
    """Figures with their joint draws.

    Attributes:
        values: (S,) float64.
        draws: (S, R) float64; the value itself where nothing is known of its error.
        known: (S,) bool, whether a figure has an error at all.
        estimates: of each figure, where the table keeps one; empty where it keeps none.
        limits: the smallest and the largest value that each figure can have, whatever the sign of
            `values`; empty where nobody asked.
    """

    values: np.ndarray
    draws: np.ndarray
    known: np.ndarray
    estimates: tuple[Estimate | None, ...] = ()
    limits: tuple[tuple[float, float], ...] = ()

    def oriented(self, sign: float) -> "Joint":
        """Times a sign: larger is better when it is that of the figure."""
        return replace(self, values=sign * self.values, draws=sign * self.draws)

    def at(self, places: Sequence[int]) -> "Joint":
        """Some of the figures."""
        own = tuple(self.estimates[k] for k in places) if self.estimates else ()
        limits = tuple(self.limits[k] for k in places) if self.limits else ()
        return Joint(self.values[places], self.draws[places], self.known[places], own, limits)

    @property
    def span(self) -> float:
        """By how much two of the figures can differ at most."""
        if not self.limits:
            return math.inf
        return max(high for _, high in self.limits) - min(low for low, _ in self.limits)

    def error(self, weights: Mapping[int, float]) -> Error:
        """The error of a weighted sum of some figures (place -> weight)."""
        if self.estimates and all(self.estimates[k] for k in weights):
            found = error_of_contrast([(w, self.estimates[k]) for k, w in weights.items()])
            if found is not None:
                return found
        drawn = sum(weight * self.draws[k] for k, weight in weights.items())
        return Error(float(np.std(drawn, ddof=1)), math.inf)

    def difference(self, i: int, j: int, level: float) -> Interval:
        """Figure i minus figure j, for this pair alone."""
        value = float(self.values[i] - self.values[j])
        return tested(value, self.error({i: 1.0, j: -1.0}), level)


def joint_draws(results: Results, rows: Sequence[Row]) -> Joint:
    """The joint draws of the figures of some rows.

    An estimate's own draws where the table keeps one; else two half-normals that meet at the value
    and have the ends of its interval as quantiles, independent of all others; else the value. All
    get the smallest number of draws that any has.
    """
    estimates = tuple(_estimate_of(results, row) for row in rows)
    found = [_draws_of(row, own) for row, own in zip(rows, estimates, strict=True)]
    count = min((len(draws) for _, draws in found if draws is not None), default=1)
    shared: dict[str, int] = {}
    draws = np.empty((len(rows), count))
    for place, (row, (drawn_by, own)) in enumerate(zip(rows, found, strict=True)):
        if own is None:
            draws[place] = row.value
            continue
        # Draws of other subsets are independent of the first ones, so they come in another order.
        group = shared.setdefault(drawn_by, len(shared))
        order = np.arange(count)
        if group:
            order = permute(order, count, _seed(drawn_by), Stream.DRAW_OF_INTERVAL, 0)
        draws[place] = own[:count][order]
    values = np.array([row.value for row in rows])
    known = np.array([own is not None for _, own in found])
    limits = tuple(_limits(results.estimate(row)) for row in rows)
    return Joint(values, draws, known, estimates, limits)


def _limits(estimate: Estimate) -> tuple[float, float]:
    """The smallest and the largest value that a figure can have.

    None where its value lies outside: it is then on another scale, such as a precision in percent.
    """
    low, high = estimate.at_least, estimate.at_most
    if estimate.name in PROPORTIONS:
        low, high = max(low, 0.0), min(high, PROPORTIONS[estimate.name])
    return (low, high) if low <= estimate.value <= high else UNLIMITED


def _estimate_of(results: Results, row: Row) -> Estimate | None:
    found = results.estimate(row)
    return found if len(found.drawn) else None


def _draws_of(row: Row, estimate: Estimate | None) -> tuple[str, np.ndarray | None]:
    if estimate is not None:
        return estimate.drawn_by, estimate.draws()
    if row.low is None or row.high is None:
        return "", None
    key = repr((row.model, row.checkpoint, row.guidance, row.training_seed, row.seed, row.data_set))
    key += repr((row.group, row.metric, row.features, row.n_generated))
    positions = np.arange(DRAWS)
    z = normal(_seed(key), Stream.DRAW_OF_INTERVAL, positions, ()).double().numpy()
    quantile = float(ndtri((1 + row.level) / 2))
    half = np.maximum(np.where(z > 0, row.high - row.value, row.value - row.low), 0.0)
    return key, row.value + z * half / quantile


def interval_of(
    row: Row, draws: np.ndarray, level: float, limits: tuple[float, float] = UNLIMITED
) -> tuple[float, float] | None:
    """A row's own interval where it is at this level, else the normal one of its draws (R,).

    Args:
        limits: the smallest and the largest value that the figure can have.
    """
    if row.low is not None and row.high is not None and row.level == level:
        return row.low, row.high
    if len(draws) < 2 or not np.ptp(draws):
        return None
    half = float(ndtri((1 + level) / 2)) * float(np.std(draws, ddof=1))
    return max(row.value - half, limits[0]), min(row.value + half, limits[1])


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def dominance(draws: np.ndarray) -> np.ndarray:
    """Probability (S, S) that i dominates j: nowhere worse, somewhere better.

    Args:
        draws: (M, S, R) of M figures, larger is better.
    """
    count = draws.shape[1]
    found = np.empty((count, count))
    for i in range(count):
        nowhere_worse = (draws[:, i : i + 1] >= draws).all(0)
        found[i] = (nowhere_worse & (draws[:, i : i + 1] > draws).any(0)).mean(1)
    return found


def front_probability(draws: np.ndarray) -> np.ndarray:
    """Probability (S,) that no other dominates; draws (M, S, R), larger is better."""
    dominated = np.zeros(draws.shape[1:], dtype=bool)
    for i in range(draws.shape[1]):
        nowhere_worse = (draws[:, i : i + 1] >= draws).all(0)
        dominated |= nowhere_worse & (draws[:, i : i + 1] > draws).any(0)
    return 1.0 - dominated.mean(1)


def front_decided(decided: Sequence[np.ndarray]) -> list[str]:
    """Per point "on", "off" or "open", from what `decisions` says of every figure of a front.

    On: of every other point some figure is decidedly worse. Off: another point is decidedly better
    in every figure.
    """
    table = np.stack(list(decided))  # (M, S, S)
    apart = (table > 0).any(0) | np.eye(table.shape[1], dtype=bool)
    beaten = (table < 0).all(0).any(1)
    return [
        "off" if off else "on" if on else "open"
        for off, on in zip(beaten, apart.all(1), strict=True)
    ]


def on_front(values: np.ndarray) -> np.ndarray:
    """Whether no other dominates, (S,) bool; values (M, S), larger is better."""
    return front_probability(values[:, :, None]) > 0.5


def beats(joint: Joint) -> np.ndarray:
    """Probability (S, S) that i is larger than j, equal ones counted half; 0.5 on the diagonal."""
    one, two = joint.draws[:, None], joint.draws[None]
    return (one > two).mean(2) + 0.5 * (one == two).mean(2)


def decisions(columns: Sequence[Joint], level: float) -> list[np.ndarray]:
    """Which pairs differ, per column (S, S) of 1 (i is larger), -1 and 0 (not decided).

    With probability `level` at least, not one decided sign is wrong.
    """
    found = pair_tests(columns, level)
    return [
        signs_of(tests, len(joint.values), level)
        for tests, joint in zip(found, columns, strict=True)
    ]


def pair_tests(columns: Sequence[Joint], level: float) -> list[Tests]:
    """Differences of all pairs (i, j), i before j, of every column, held against each other.

    Two-sided tests (metrics/comparing.py) with Holm's correction over all columns, and intervals
    that hold at once. A pair of which one figure has no known error is left out.
    """
    pairs = [
        (number, i, j)
        for number, joint in enumerate(columns)
        for i, j in itertools.combinations(range(len(joint.values)), 2)
        if joint.known[i] and joint.known[j]
    ]
    each = level_of_each(level, len(pairs))
    tested_pairs = with_holm({(n, i, j): columns[n].difference(i, j, each) for n, i, j in pairs})
    found: list[Tests] = [{} for _ in columns]
    for (number, i, j), one in tested_pairs.items():
        found[number][i, j] = one
    return found


def signs_of(tests: Tests, count: int, level: float) -> np.ndarray:
    """What the tests of a column's pairs decide, (count, count) as of `decisions`."""
    found = np.zeros((count, count), dtype=np.int64)
    for (i, j), one in tests.items():
        if one.adjusted_p_value <= 1 - level:
            sign = int(np.sign(one.value))
            found[i, j], found[j, i] = sign, -sign
    return found


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks (S, ...) from 1 for the largest along the first axis; equal ones share the best."""
    return 1 + (values[None] > values[:, None]).sum(1)


def rank_distribution(joint: Joint) -> np.ndarray:
    """Probability (S, S) that figure i has rank k + 1 among the draws."""
    drawn = ranks(joint.draws)
    return np.stack([(drawn == k).mean(1) for k in range(1, len(drawn) + 1)], axis=1)


def rank_bounds(decided: np.ndarray) -> list[tuple[int, int]]:
    """The best and the worst rank of each that the decided pairs (S, S) leave open."""
    better, worse = (decided < 0).sum(1), (decided > 0).sum(1)
    return [(1 + int(b), len(decided) - int(w)) for b, w in zip(better, worse, strict=True)]


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b (1945) of values (S,) and (S,); NaN where all of one are equal."""
    upper = np.triu_indices(len(a), 1)
    x, y = (np.sign(v[:, None] - v[None])[upper] for v in (a, b))
    pairs = np.sqrt(float(np.abs(x).sum()) * float(np.abs(y).sum()))
    return float((x * y).sum() / pairs) if pairs else float("nan")


def tau_bounds(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The smallest and largest tau that the decided pairs (S, S) of two columns leave open."""
    upper = np.triu_indices(len(a), 1)
    product = (a * b)[upper]
    undecided, count = int((product == 0).sum()), max(len(product), 1)
    return (float(product.sum()) - undecided) / count, (float(product.sum()) + undecided) / count
