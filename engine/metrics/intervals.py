"""Intervals for figures of samples; called by evaluation/plan.py and evaluation/compare.py.

What the interval is for: the expected value of the figure at this number of pictures, over fresh
draws of both sides. The figure itself is unbiased for that. Rows drawn with replacement are not
fresh draws (copies have nearest neighbours at distance zero and covariances lose rank), so the
naive bootstrap is wrong here by many interval widths. Rows are deleted instead (Shao and Wu 1989):
a replicate keeps a random share q of the rows of each side. Its expectation differs from the
figure's, since fewer rows are used, so only its spread is used, around the figure at full size.

Spread to standard error. With the Hoeffding parts of a smooth figure of variance a at first order
and c at second, the replicates' variance times q / (1 - q) is a + c (1 + q) / q, while the figure's
own is a + c. Near equality of two distributions a vanishes and one share would give an interval
1.4 times too wide or more; two shares separate the parts. Nearest-neighbour figures are averages of
local terms; there half of the rows are kept, which is close, on the wide side. Coverage is
simulated in tests/metrics/test_intervals.py; a figure that is strongly skewed at its n, as the
kernel distance of few widely spread features is, is covered somewhat less often than stated.
"""

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch

from etude.core.config import Config, option
from etude.core.rng import Stream, bits

PROPORTIONS = ("precision", "recall", "coverage")


class IntervalConfig(Config):
    """How the interval of every figure is computed."""

    method: Literal["jackknife", "subsampling"] = option(
        "jackknife",
        "jackknife: normal interval from deleted rows; subsampling: quantiles of half-samples",
    )
    level: float = option(0.95, "probability that the interval covers", gt=0.5, lt=1.0)
    replicates: int = option(200, "subsets drawn per share of kept rows; 0: no interval", ge=0)


@dataclass(frozen=True)
class Interval:
    """A figure with its interval for the expected value at this number of pictures."""

    value: float
    low: float | None
    high: float | None
    standard_error: float | None
    level: float
    method: str

    def as_dict(self) -> dict:
        """Plain values for result.json."""
        return asdict(self)

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def kept_rows(
    count: int,
    share: float,
    replicates: int,
    seed: int,
    side: int = 0,
    strata: torch.Tensor | None = None,
) -> torch.Tensor:
    """Random subsets that keep round(share * count) rows, (replicates, count) bool.

    A function of its arguments, so two figures of the same rows get the same subsets.

    Args:
        side: 0 for the first set of pictures, 1 for the second; their subsets are independent.
        strata: (count,) int64, such as labels; each keeps its share of the rows. Pictures drawn
            with the classes in turn have no chance in how many there are of each, and subsets
            must have none either.
    """
    position = np.arange(replicates, dtype=np.int64) + (side << 32)
    words = torch.from_numpy(bits(seed, Stream.SUBSET, position, count).astype(np.int64))
    strata = torch.zeros(count, dtype=torch.int64) if strata is None else strata.cpu()
    _, stratum, sizes = torch.unique(strata, return_inverse=True, return_counts=True)
    ends = sizes.cumsum(0)
    kept_ends = (ends.double() * share).round().long()
    kept = torch.diff(kept_ends, prepend=torch.zeros(1, dtype=torch.int64))
    rank = torch.arange(count) - torch.repeat_interleave(ends - sizes, sizes)
    chosen = rank < torch.repeat_interleave(kept, sizes)
    order = (words + (stratum << 32)).argsort(dim=1, stable=True)
    found = torch.zeros(replicates, count, dtype=torch.bool)
    return found.scatter_(1, order, chosen.expand(replicates, -1))


def shares(kind: Literal["smooth", "local"], method: str, smallest_share: float) -> list[float]:
    """Shares of kept rows that a figure's interval needs.

    Args:
        kind: "smooth" for functions of moments and of all pairs, "local" for nearest neighbours.
        smallest_share: below it the figure changes character, as a covariance does with fewer rows
            than dimensions. The second share stays above it, and is left out where that comes near
            the first; the interval is then up to 1.4 times too wide.
    """
    if method == "subsampling" or kind == "local":
        return [0.5]
    second = max(0.3, 1.15 * smallest_share)
    return [0.9, second] if second <= 0.6 else [0.9]


def standard_error(replicates: dict[float, np.ndarray], kind: str) -> float:
    """The figure's standard error from replicates (R,) per share of kept rows."""
    scaled = {q: q / (1 - q) * float(np.var(v, ddof=1)) for q, v in replicates.items()}
    high = max(scaled)
    if kind == "local" or len(scaled) == 1:
        return scaled[high] ** 0.5
    low = min(scaled)
    weight_high, weight_low = (1 + high) / high, (1 + low) / low
    second = (scaled[low] - scaled[high]) / (weight_low - weight_high)
    second = min(max(second, 0.0), scaled[high] / weight_high)
    return max(scaled[high] - second * (weight_high - 1), 0.0) ** 0.5


def interval(
    name: str,
    value: float,
    replicates: dict[float, np.ndarray],
    config: IntervalConfig,
    *,
    kind: Literal["smooth", "local"] = "smooth",
    count: int = 0,
    at_least: float = -math.inf,
) -> Interval:
    """The interval of one figure.

    Args:
        name: the figure; a name in `PROPORTIONS` always gets a score interval, which stays in
            [0, 1] and has width where every replicate is 1.
        replicates: values (R,) per share of kept rows.
        count: for a proportion, the rows that it is a share of.
        at_least: the smallest value that the figure can have.
    """
    if not config.replicates:
        return Interval(value, None, None, None, config.level, "none")
    error, z = standard_error(replicates, kind), NormalDist().inv_cdf((1 + config.level) / 2)
    if name in PROPORTIONS:
        low, high = _score_interval(value, error, count, z)
    elif config.method == "subsampling":
        ((share, drawn),) = replicates.items()
        tail = (1 - config.level) / 2
        ends = np.quantile(drawn - drawn.mean(), [1 - tail, tail]) * (share / (1 - share)) ** 0.5
        low, high = (float(value - end) for end in ends)
    else:
        low, high = value - z * error, value + z * error
    low, high = max(low, at_least), max(high, at_least)
    return Interval(value, low, high, error, config.level, config.method)


def proportion(value: float, count: int, config: IntervalConfig) -> Interval:
    """The score interval of a share of `count` independent rows; needs no replicates."""
    z = NormalDist().inv_cdf((1 + config.level) / 2)
    low, high = _score_interval(value, 0.0, count, z)
    error = (value * (1 - value) / count) ** 0.5
    return Interval(value, max(low, 0.0), min(high, 1.0), error, config.level, "score")


def _score_interval(share: float, error: float, count: int, z: float) -> tuple[float, float]:
    """Wilson's interval with the number of independent rows that the standard error implies."""
    # Drawn towards one half as the interval's centre is: at a share of 1 the plain variance is 0.
    shrunk = (share * count + z * z / 2) / (count + z * z)
    implied = shrunk * (1 - shrunk) / error**2 if error > 0 else count
    rows, variance = max(min(count, implied), 1.0), share * (1 - share)
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * (variance / rows + z * z / (4 * rows * rows)) ** 0.5
    return centre - half, centre + half
