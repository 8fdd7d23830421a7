"""Accuracies that were measured on the same pictures, compared with intervals.

Called by rounds.py for one seed and by experiments for several. One seed: the score interval of a
difference of paired proportions (Tango 1998, Statistics in Medicine 17:891-908), which inverts
McNemar's statistic and keeps its coverage at small counts, and McNemar's exact p-value. Several
seeds: pictures and seeds are crossed random effects; the variance of the mean difference is
(MS_seed + MS_picture - MS_rest) / (seeds * pictures), with Satterthwaite's degrees of freedom. The
generator is the same in all seeds, so such an interval speaks about this generator only. Several
arms against one: p-values adjusted by Holm (1979, Scandinavian Journal of Statistics 6:65-70) and
intervals at Bonferroni's level, both valid however the comparisons depend on each other.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

from etude.core.errors import UserError
from etude.metrics.comparing import holm


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval at `level`; accuracies and differences are in [-1, 1].

    Attributes:
        p_value: two-sided, of "no difference", for this comparison alone.
        adjusted_p_value: the same held against all comparisons made beside it.
    """

    value: float
    low: float
    high: float
    level: float = 0.95
    p_value: float | None = None
    degrees_of_freedom: float | None = None
    adjusted_p_value: float | None = None

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def accuracy_interval(correct: int, total: int, level: float = 0.95) -> Interval:
    """Exact binomial interval (Clopper and Pearson 1934) of `correct` out of `total` pictures."""
    found = stats.binomtest(correct, total).proportion_ci(level, method="exact")
    return Interval(correct / total, float(found.low), float(found.high), level)


def paired_difference(
    correct_a: np.ndarray, correct_b: np.ndarray, level: float = 0.95
) -> Interval:
    """Accuracy of a minus accuracy of b on the same pictures, with Tango's score interval.

    Args:
        correct_a, correct_b: (pictures,) bool or 0/1, in the same order.
        level: coverage over repeated draws of test pictures, in (0, 1).

    Returns:
        The difference, its interval, and McNemar's exact two-sided p-value for "no difference".
    """
    a, b = _as_matrix(correct_a, correct_b)
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    total = a.size
    value = (only_a - only_b) / total
    quantile = float(stats.norm.ppf(0.5 + level / 2.0))

    def excess(difference: float, bound: float) -> float:
        # The statistic is infinite at -1 and 1; a finite stand-in keeps the root finder going.
        return float(np.clip(_tango(only_a, only_b, total, difference), -1e9, 1e9)) - bound

    low = -1.0 if value == -1.0 else optimize.brentq(excess, -1.0, value, args=(quantile,))
    high = 1.0 if value == 1.0 else optimize.brentq(excess, value, 1.0, args=(-quantile,))
    discordant = only_a + only_b
    p_value = stats.binomtest(only_a, discordant).pvalue if discordant else 1.0
    return Interval(value, low, high, level, p_value=float(p_value))


def paired_interval(correct_a: np.ndarray, correct_b: np.ndarray, level: float = 0.95) -> Interval:
    """Accuracy of a minus accuracy of b over test pictures AND seeds.

    Args:
        correct_a, correct_b: (seeds, pictures) bool or 0/1; row s of both is the same seed, column
            i the same test picture. At least two seeds.
        level: coverage over repeated draws of pictures and of seeds, in (0, 1).

    Returns:
        The mean difference with a t interval and the t test's p-value. Each of the two sources of
        chance alone is a lower bound of the variance used, so a negative variance component never
        narrows the interval.
    """
    a, b = _as_matrix(correct_a, correct_b)
    if a.ndim != 2 or min(a.shape) < 2:
        raise UserError(
            f"paired_interval got correctness of shape {a.shape}, and needs (seeds, pictures) with "
            "at least two of each: use paired_difference for one seed"
        )
    difference = a - b
    seeds, pictures = difference.shape
    value = float(difference.mean())
    by_seed, by_picture = difference.mean(axis=1), difference.mean(axis=0)
    rest = difference - by_seed[:, None] - by_picture[None, :] + value
    freedom = {"seed": seeds - 1, "picture": pictures - 1, "rest": (seeds - 1) * (pictures - 1)}
    square = {
        "seed": pictures * float(((by_seed - value) ** 2).sum()) / freedom["seed"],
        "picture": seeds * float(((by_picture - value) ** 2).sum()) / freedom["picture"],
        "rest": float((rest**2).sum()) / freedom["rest"],
    }
    total = square["seed"] + square["picture"] - square["rest"]
    if total <= max(square["seed"], square["picture"]):
        used = max(("seed", "picture"), key=square.__getitem__)
        total, degrees = square[used], float(freedom[used])
    else:
        degrees = total**2 / sum(square[name] ** 2 / freedom[name] for name in square)
    if total == 0.0:
        never = float(value == 0.0)
        return Interval(value, value, value, level, never, degrees_of_freedom=degrees)
    error = math.sqrt(total / (seeds * pictures))
    half = float(stats.t.ppf(0.5 + level / 2.0, degrees)) * error
    p_value = float(2.0 * stats.t.sf(abs(value) / error, degrees))
    low, high = max(-1.0, value - half), min(1.0, value + half)
    return Interval(value, low, high, level, p_value, degrees_of_freedom=degrees)


def compare_all(
    correct: dict[str, np.ndarray], reference: str, level: float = 0.95
) -> dict[str, Interval]:
    """Accuracy of `reference` minus that of every other arm, by the other arm's name.

    Args:
        correct: arm -> (pictures,) or (seeds, pictures) bool or 0/1, all of one shape; the same
            pictures in the same order and, with several seeds, the same seeds.
        reference: the arm that the others are held against.
        level: chance that all intervals hold at once, in (0, 1).

    Returns:
        One interval per other arm, each at 1 - (1 - level) / comparisons. `adjusted_p_value` is
        Holm's: rejecting where it is at most 1 - level errs anywhere with at most that chance. Holm
        rejects more than the intervals do, so an interval may hold 0 beside a small adjusted p.

    Raises:
        UserError: no such reference, nothing to compare it with, or shapes that differ.
    """
    others = [arm for arm in correct if arm != reference]
    if reference not in correct or not others:
        raise UserError(
            f"{reference!r} cannot be compared within arms {', '.join(correct) or '(none)'}: name "
            "one of at least two arms"
        )
    each = 1.0 - (1.0 - level) / len(others)
    found = {}
    for arm in others:
        a, b = np.asarray(correct[reference]), np.asarray(correct[arm])
        one_seed = a.ndim == 1 or a.shape[0] == 1
        compare = paired_difference if one_seed else paired_interval
        found[arm] = compare(a, b, each)
    adjusted = holm([found[arm].p_value for arm in others])
    return {
        arm: replace(found[arm], adjusted_p_value=p)
        for arm, p in zip(others, adjusted, strict=True)
    }


def _as_matrix(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(correct_a, dtype=np.float64), np.asarray(correct_b, dtype=np.float64)
    if a.shape != b.shape or a.size == 0:
        raise UserError(
            f"correctness vectors of shapes {a.shape} and {b.shape} cannot be paired: both must "
            "come from the same test pictures in the same order"
        )
    return a, b


def _tango(only_a: int, only_b: int, total: int, difference: float) -> float:
    """Score statistic for P(only a) - P(only b) = difference (Tango 1998, equations 7 to 9)."""
    linear = -only_a - only_b + (2 * total - only_a + only_b) * difference
    constant = -only_b * difference * (1.0 - difference)
    root = math.sqrt(max(linear**2 - 8.0 * total * constant, 0.0))
    smaller = max((root - linear) / (4.0 * total), 0.0)  # constrained maximum likelihood P(only b)
    variance = total * (2.0 * smaller + difference * (1.0 - difference))
    distance = only_a - only_b - total * difference
    if variance <= 0.0:
        return 0.0 if distance == 0.0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)
