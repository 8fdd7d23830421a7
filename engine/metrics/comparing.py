"""Differences of figures: of two models, of several at once; called by evaluation/ and practice/.

Differences are taken halving by halving (intervals.py), so what two estimates share cancels: the
reference always, and pictures of the same seeds and prompts. Several comparisons are held against
each other by Holm (1979, Scandinavian Journal of Statistics 6:65-70), and their intervals are at
Bonferroni's level; both are right however the comparisons depend on each other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from .estimates import Estimate, root_of_errors
from .intervals import Interval, IntervalConfig, Spread, kind_of, quantile

POWER = 0.8


@dataclass(frozen=True)
class Error:
    """The standard error of a figure or a difference, with its degrees of freedom."""

    standard_error: float
    degrees: float


def difference(b: Estimate, a: Estimate, config: IntervalConfig | None = None) -> Interval:
    """Figure of b minus figure of a, with interval and the two-sided p-value of "no difference".

    Estimates of other halves than each other's (`drawn_by`) count as independent. Without
    replicates on both sides only the difference is known.
    """
    config = config or IntervalConfig()
    value = b.value - a.value
    found = error_of_difference(b, a)
    if found is None:
        return Interval(value, None, None, None, config.level, "none")
    return tested(value, found, config.level)


def error_of_difference(b: Estimate, a: Estimate) -> Error | None:
    """The error of b minus a; None where one's is not known."""
    return error_of_contrast([(1.0, b), (-1.0, a)])


def error_of_contrast(terms: Sequence[tuple[float, Estimate]]) -> Error | None:
    """The error of a weighted sum of figures; None where one's is not known.

    Terms of equal halves are taken together; the sums over other halves count as independent.
    """
    if any(not len(estimate.drawn) and estimate.errors is None for _, estimate in terms):
        return None
    together: dict[tuple, list[tuple[float, Estimate]]] = {}
    for weight, estimate in terms:
        # Exact errors of equal units add unit by unit, the others halving by halving.
        units = -1 if estimate.errors is None else len(estimate.errors)
        key = estimate.drawn_by, len(estimate.drawn), units
        together.setdefault(key, []).append((weight, estimate))
    parts = [_error_of_same(same) for same in together.values()]
    total = sum(part.standard_error**2 for part in parts)
    if total == 0.0:
        return Error(0.0, math.inf)
    slack = sum(part.standard_error**4 / part.degrees for part in parts)
    return Error(total**0.5, total**2 / slack if slack > 0.0 else math.inf)


def tested(value: float, error: Error, level: float) -> Interval:
    """A difference with Student's interval and p-value."""
    half = quantile(level, error.degrees) * error.standard_error
    if error.standard_error == 0.0:
        p_value = float(value == 0.0)
    else:
        p_value = 2.0 * float(stats.t.sf(abs(value) / error.standard_error, error.degrees))
    degrees = error.degrees if math.isfinite(error.degrees) else None
    return Interval(
        value,
        value - half,
        value + half,
        error.standard_error,
        level,
        "difference",
        p_value=p_value,
        degrees_of_freedom=degrees,
    )


def level_of_each(level: float, count: int) -> float:
    """The level of each of `count` intervals that hold at once with at least `level` (Bonferroni).

    Holm rejects more than they do, so an interval may hold 0 beside a small adjusted p-value.
    """
    return 1.0 - (1.0 - level) / max(count, 1)


def with_holm(found: Mapping) -> dict:
    """Intervals with adjusted p-values, held against each other where they have p-values."""
    known = [key for key, one in found.items() if one.p_value is not None]
    adjusted = dict(zip(known, holm([found[key].p_value for key in known]), strict=True))
    return {key: replace(one, adjusted_p_value=adjusted.get(key)) for key, one in found.items()}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given; each in [0, 1] and none below its own."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def needed(value: float, error: float, count: int, level: float = 0.95) -> int | None:
    """How many pictures would tell a difference apart with probability `POWER`.

    Assumes that the true difference is the one measured, that its standard error falls as one over
    the root of the number of pictures, real and generated ones growing together, and a two-sided
    test at 1 - level. AuthPct of a collapsed model needs more, since its error falls more slowly.
    None where the difference measured is 0 or its error is not known.

    Args:
        value, error: the difference and its standard error with `count` pictures a side.
    """
    if value == 0.0 or not math.isfinite(error) or error <= 0.0:
        return None
    z = quantile(level) + float(stats.norm.ppf(POWER))
    return max(count, math.ceil(count * (z * error / abs(value)) ** 2))


def _error_of_same(terms: Sequence[tuple[float, Estimate]]) -> Error:
    """The error of a weighted sum of figures of equal halves or units."""
    if all(estimate.errors is not None for _, estimate in terms):
        errors = sum(weight * estimate.errors for weight, estimate in terms)
        return Error(root_of_errors(errors), len(errors) - 1)
    kind = kind_of(terms[0][1].name, terms[0][1].kind)
    spread = Spread.sum([(weight, estimate.spread) for weight, estimate in terms])
    unseen = sum(weight**2 * estimate.unseen() for weight, estimate in terms)
    return Error((spread.variance(kind) + unseen) ** 0.5, spread.degrees(kind))
