"""Worst and best groups, the gap between them, and differences from their mean, with intervals.

The gap of noisy figures is too large: even equal groups show one. Its interval therefore comes from
intervals of the differences of all pairs of groups that hold at once (Bonferroni): where they hold,
the true gap, the largest of the true differences, lies between the largest lower end and the
largest upper end. Whether equal groups can show it too is asked of the same pairs, so the p-value
and the interval agree. Beside them stands the gap that equal groups would show by chance. No end
leaves what the figure can be. Called by groups.py.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from etude.metrics.comparing import holm, level_of_each, tested

from ..results import Row
from .joint import Joint
from .names import Figure


@dataclass(frozen=True)
class GroupModel:
    """One figure of one model in every group."""

    name: str
    rows: list[Row]
    joint: Joint
    found: dict[str, Any]


def findings(joint: Joint, figure: Figure, groups: list[str], level: float) -> dict[str, Any]:
    """Worst and best groups, gap with interval, differences from the mean, as plain values.

    Which differences are decided is left to `decide`, which sees those of all models.
    """
    better = figure.sign * joint.values
    worst, best = float(better.min()), float(better.max())
    found: dict[str, Any] = {
        "values": joint.values.tolist(),
        "mean": float(joint.values.mean()),
        "worst": [group for group, value in zip(groups, better, strict=True) if value == worst],
        "best": [group for group, value in zip(groups, better, strict=True) if value == best],
        "gap": best - worst,
        "gap_low": None,
        "gap_high": None,
        "chance_gap": None,
        "p_equal": None,
        "differences": None,
    }
    if not joint.known.all():
        return found
    found["gap_low"], found["gap_high"], found["p_equal"] = gap_interval(joint, level)
    by_chance = np.ptp(joint.draws - joint.draws.mean(1, keepdims=True), axis=0)
    found["chance_gap"] = min(float(np.quantile(by_chance, level)), joint.span)
    found["differences"] = _differences(joint, groups, level)
    return found


def gap_interval(joint: Joint, level: float) -> tuple[float, float, float]:
    """Low and high end for the true difference of the best and the worst of (S,) figures, and the
    p-value of "all are equal", which is above 1 - level where the low end is 0.
    """
    pairs = list(itertools.combinations(range(len(joint.values)), 2))
    apart = [
        tested(
            abs(float(joint.values[i] - joint.values[j])),
            joint.error({i: 1.0, j: -1.0}),
            level_of_each(level, len(pairs)),
        )
        for i, j in pairs
    ]
    high = min(max(one.high for one in apart), joint.span)
    p_equal = min(holm([one.p_value for one in apart]))
    return max(0.0, *(one.low for one in apart)), high, p_equal


def decide(found: Sequence[tuple[Figure, dict[str, Any]]], level: float, correction: str) -> int:
    """Correct the p-values of all differences from means together, and say which are decided.

    Args:
        found: of each model its figure and what `findings` gave.
        correction: "holm" or "bonferroni".

    Returns:
        How many tests hold together.
    """
    tests = [(figure, one) for figure, of in found for one in of["differences"] or ()]
    p = [one["p"] for _, one in tests]
    adjusted = holm(p) if correction == "holm" else np.minimum(len(p) * np.array(p), 1.0)
    for (figure, one), value in zip(tests, adjusted, strict=True):
        one["p"] = float(value)
        if one["p"] <= 1 - level:
            one["verdict"] = "better" if figure.sign * one["difference"] > 0 else "worse"
    return len(tests)


def _differences(joint: Joint, groups: list[str], level: float) -> list[dict[str, Any]]:
    """Each group less the mean of all, with intervals that hold at once and plain p-values."""
    values, count = joint.values - joint.values.mean(), len(groups)
    most = joint.span * (count - 1) / count  # where all others are at the other end
    found = []
    for place, group in enumerate(groups):
        one = tested(
            float(values[place]),
            joint.error({k: float(k == place) - 1.0 / count for k in range(count)}),
            level_of_each(level, count),
        )
        found.append(
            {
                "group": group,
                "difference": one.value,
                "low": max(one.low, -most),
                "high": min(one.high, most),
                "p": one.p_value,
                "verdict": "not decided",
            }
        )
    return found
