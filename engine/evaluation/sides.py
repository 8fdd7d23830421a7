"""One model in a comparison, its training runs, and the difference of two; called by verdict.py.

Training runs differ by chance. Between models with rows of several training seeds, seeds are
random effects. Two seeds of a model say next to nothing of its own variance, so runs are assumed to
scatter equally in all models: S^2 is pooled over those of a verdict that have several runs, with
the sum of K - 1 as degrees of freedom, and so is W, what pictures explain of it. The variance of a
difference of means of K and L runs is max(S^2 - W, 0) (1 / K + 1 / L) plus the pictures' own, and
never less than S^2 (1 / K + 1 / L) (Satterthwaite's degrees of freedom). Where a side has one run,
that noise is not included.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from etude.metrics.comparing import Error, error_of_contrast, tested
from etude.metrics.estimates import Estimate
from etude.metrics.intervals import Interval

from .results import Row


@dataclass(frozen=True)
class Side:
    """One model in a comparison.

    Attributes:
        model: its name and checkpoint.
        runs: training run -> its rows and estimates; one run where no training seed is known.
    """

    title: str
    model: tuple[str, str]
    runs: Mapping[int | None, tuple[tuple[Row, Estimate], ...]]

    @property
    def values(self) -> np.ndarray:
        """The figure of each training run, (K,)."""
        return np.array([np.mean([row.value for row, _ in run]) for run in self.runs.values()])

    @property
    def value(self) -> float:
        """Their mean."""
        return float(self.values.mean())

    @property
    def pictures(self) -> int:
        """Generated pictures behind one figure."""
        return next(iter(self.runs.values()))[0][0].n_generated

    def terms(self, weights: Sequence[float]) -> list[tuple[float, Estimate]]:
        """Every estimate with its weight, for a weighted sum over the training runs."""
        return [
            (weight / len(run), estimate)
            for weight, run in zip(weights, self.runs.values(), strict=True)
            for _, estimate in run
        ]


@dataclass(frozen=True)
class Scatter:
    """How training runs scatter, pooled over models that have several.

    Attributes:
        spread: variance of the figure over runs.
        beyond: what of it pictures do not explain.
        degrees: degrees of freedom of `spread`.
    """

    spread: float
    beyond: float
    degrees: int


def compare_sides(b: Side, a: Side, level: float, scatter: Scatter | None = None) -> Interval:
    """Figure of b minus figure of a, with the noise of training runs where both have several.

    Args:
        scatter: of the runs of all models of the verdict; None: of these two.
    """
    value = b.value - a.value
    counts = len(b.runs), len(a.runs)
    even = [np.full(count, 1.0 / count) for count in counts]
    pictures = error_of_contrast([*b.terms(even[0]), *a.terms(-even[1])])
    if min(counts) < 2:
        if pictures is None:
            return Interval(value, None, None, None, level, "none")
        return tested(value, pictures, level)
    scatter = scatter or scatter_of_runs((b, a))
    share = sum(1.0 / count for count in counts)
    within = 0.0 if pictures is None else pictures.standard_error**2
    total = max(scatter.beyond * share + within, scatter.spread * share)
    slack = (scatter.spread * share) ** 2 / scatter.degrees
    if pictures is not None:
        slack += within**2 / pictures.degrees
    degrees = total**2 / slack if slack > 0.0 else math.inf
    return tested(value, Error(total**0.5, degrees), level)


def scatter_of_runs(sides: Iterable[Side]) -> Scatter | None:
    """How training runs scatter, of all sides that have several; None where none has."""
    squares, explained, degrees = 0.0, 0.0, 0
    for side in sides:
        count = len(side.runs)
        if count < 2:
            continue
        squares += float(np.square(side.values - side.value).sum())
        degrees += count - 1
        for place in range(count):
            weights = np.full(count, -1.0 / count)
            weights[place] += 1.0
            error = error_of_contrast(side.terms(weights))
            explained += 0.0 if error is None else error.standard_error**2
    if not degrees:
        return None
    return Scatter(squares / degrees, max(squares - explained, 0.0) / degrees, degrees)
