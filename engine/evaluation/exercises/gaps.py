"""Worst and best groups, the gap between them, and differences from their mean, with intervals.

The gap of noisy figures is too large: even equal groups show one. Its interval therefore comes from
intervals of the differences of all pairs of groups that hold at once (Bonferroni): where they hold,
the true gap, the largest of the true differences, lies between the largest lower end and the
largest upper end. Beside it stands the gap that equal groups would show by chance. No end leaves
what the figure can be. Called by groups.py.
"""

import itertools
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


def findings(
    joint: Joint, figure: Figure, groups: list[str], level: float, correction: str
) -> dict[str, Any]:
    """Worst and best groups, gap with interval, differences from the mean, as plain values.

    Args:
        correction: "holm" or "bonferroni", of the tests whether groups differ from their mean.
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
    found["gap_low"], found["gap_high"] = gap_interval(joint, level)
    by_chance = np.ptp(joint.draws - joint.draws.mean(1, keepdims=True), axis=0)
    found["chance_gap"] = min(float(np.quantile(by_chance, level)), joint.span)
    # One more on both sides: a test by draws is never surer than their number, of which half
    # counts, since draws come in pairs of opposite signs with one range.
    count = len(by_chance) // 2
    share = float((by_chance >= found["gap"]).mean())
    found["p_equal"] = (1 + count * share) / (1 + count)
    found["differences"] = _differences(joint, figure, groups, level, correction)
    return found


def gap_interval(joint: Joint, level: float) -> tuple[float, float]:
    """Low and high end for the true difference of the best and the worst of (S,) figures."""
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
    return max(0.0, *(one.low for one in apart)), high


def _differences(
    joint: Joint, figure: Figure, groups: list[str], level: float, correction: str
) -> list[dict[str, Any]]:
    """Each group less the mean of all, with intervals that hold at once and corrected p values."""
    values, count = joint.values - joint.values.mean(), len(groups)
    most = joint.span * (count - 1) / count  # where all others are at the other end
    apart = [
        tested(
            float(values[place]),
            joint.error({k: float(k == place) - 1.0 / count for k in range(count)}),
            level_of_each(level, count),
        )
        for place in range(count)
    ]
    p = [one.p_value for one in apart]
    adjusted = holm(p) if correction == "holm" else np.minimum(count * np.array(p), 1.0)
    found = []
    for place, group in enumerate(groups):
        verdict = "not decided"
        if adjusted[place] <= 1 - level:
            verdict = "better" if figure.sign * values[place] > 0 else "worse"
        found.append(
            {
                "group": group,
                "difference": apart[place].value,
                "low": max(apart[place].low, -most),
                "high": min(apart[place].high, most),
                "p": float(adjusted[place]),
                "verdict": verdict,
            }
        )
    return found
