"""Intervals for figures of samples; called by estimates.py, comparing.py and evaluation/.

What an interval is for: the expected value of the figure at this number of pictures, over fresh
draws of both sides. The figure itself is unbiased for that. Rows drawn with replacement are not
fresh draws (copies have nearest neighbours at distance zero and covariances lose rank), so the
naive bootstrap is wrong here by many interval widths. The pictures are halved at random instead: A
and B are the figure on disjoint random halves of both sides, T the figure of all pictures,

    L = (A - B) / 2,     D = (A + B) / 2 - T,     over R random halvings.

A and B have no picture in common, so E L^2 = Var(figure of n / 2 pictures) / 2 exactly, whatever
the figure is. What follows for n pictures depends on the kind of figure.

"local": averages of local terms, as those of nearest neighbours. The variance is E L^2 + Var D, as
that of T = (A + B) / 2 - D whose parts have little in common. For a proportion it is E L^2 alone,
scaled from p (1 - p) of the halves' to that of the whole's. At 0 and 1 every half says the same;
no error is taken to be less than there, with p (1 - p) of the share drawn towards one half.

"concentrated": proportions that may hang on a few rows of the other side, as AuthPct of a collapsed
model does on the training pictures beside it. More pictures find more such rows only slowly, and
the variance falls as n^-g with g < 1, over n / 4, n / 2 and n alike. Every half is halved again:
with Q half of the difference of its two quarters E Q^2 = Var(figure of n / 4 pictures) / 2, and the
variance is E L^2 (2 E L^2 / E Q^2), the last factor at least 1, and at most the 2 of g = 0.

"smooth": functions of moments, of all pairs. With the Hoeffding parts a of first and c of second
order E L^2 = a + 2 c and Var D = c, so the variance a + c is E L^2 - Var D. (The difference is
minus the covariance of A and B, for a U-statistic without bias at any order: Wang and Lindsay 2014,
Statistica Sinica 24:1117-1141.) L^2 follows the value and D does not, so a is taken as E L^2 - 2 c,
at least 0, and c from D alone.

"distance": smooth, least where both distributions are equal and growing as a square from there.
Then a grows in proportion to the figure's excess over T_0, its expected value at equality, and a
symmetric interval misses on one side. The interval is Wilson's (1927) in this case: all t with

    (T - t)^2 <= z^2 (c + s (t - T_0)),     T_0 = mean D,     s = E L^2 / (T - T_0 + V),

V = 2 c^2 / E (D - T_0)^3 for the mean of the second-order part. Where one squared normal is all of
it, this is exact in expectation at every distance. The differences of far sets may lie along other
directions than that part, so V goes over to 2 c (T - T_0) / a, if that is more, as T - T_0 outgrows
its error at equality: the variance at T is then a + c.

z is Student's quantile, for the noise of R halvings. Coverage is simulated in
benchmarks/calibration.py and, shortly, in tests/metrics/test_intervals.py.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Self

import numpy as np
import torch
from pydantic import model_validator
from scipy import stats

from etude.core.config import Config, option
from etude.core.rng import Stream, bits

# Shares of rows, and what a share of one is called.
PROPORTIONS = {"precision": 1.0, "recall": 1.0, "coverage": 1.0, "AuthPct": 100.0}
HALF, QUARTER = 0.5, 0.25
FEWEST_HALVINGS = 10  # halvings from which a variance can be told
Kind = Literal["smooth", "local", "distance", "share", "concentrated"]


class IntervalConfig(Config):
    """How the interval of every figure is computed."""

    level: float = option(0.95, "probability that the interval covers", gt=0.5, lt=1.0)
    replicates: int = option(200, "random halvings of the pictures; 0: no interval", ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 0 < self.replicates < FEWEST_HALVINGS:
            raise ValueError(
                f"replicates must be 0 or at least {FEWEST_HALVINGS}, not {self.replicates}"
            )
        return self


@dataclass(frozen=True)
class Interval:
    """A figure, or a difference of figures, with its interval.

    Attributes:
        low, high, standard_error: None where no interval was made.
        method: how it was made; "none" where it was not.
        p_value: of a difference, two-sided, of "no difference", for this comparison alone.
        adjusted_p_value: the same held against all comparisons made beside it.
        degrees_of_freedom: of Student's distribution that it used.
    """

    value: float
    low: float | None
    high: float | None
    standard_error: float | None
    level: float
    method: str
    p_value: float | None = None
    adjusted_p_value: float | None = None
    degrees_of_freedom: float | None = None

    def as_dict(self) -> dict:
        """Plain values for result.json."""
        return asdict(self)

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Spread:
    """What halvings say of a figure's error.

    Attributes:
        half: L (R,) float64, half of the differences of the two halves.
        middle: D (R,) float64, means of the two halves less the figure of all pictures.
        units: independent pictures, or prompts, of the side that has fewer.
        quarter: Q (2 R,) float64, half of the differences of the two quarters of every half; (0,)
            where nothing was measured on quarters.
    """

    half: np.ndarray
    middle: np.ndarray
    units: float = math.inf
    quarter: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(
        cls,
        value: float,
        halves: np.ndarray,
        units: float = math.inf,
        quarters: np.ndarray | None = None,
        *,
        name: str = "",
        count: int = 0,
    ) -> "Spread":
        """From the figure's values (2 R,) on R halves, then on their complements.

        Args:
            quarters: the values (4 R,) on quarters, as `halves` draws them.
            name, count: as of `interval`; the differences of a proportion's values are scaled to
                those that it would have at its own p (1 - p).
        """
        one, other = np.split(np.asarray(halves, np.float64), 2)
        half, middle, quarter = (one - other) / 2, (one + other) / 2 - value, np.zeros(0)
        if quarters is not None and len(quarters):
            first, second, third, fourth = np.split(np.asarray(quarters, np.float64), 4)
            quarter = np.concatenate([first - second, third - fourth]) / 2
        if name in PROPORTIONS and len(half):
            half = half * _scale(name, value, halves, count)
            if len(quarter):
                quarter = quarter * _scale(name, value, quarters, count)
        return cls(half, middle, units, quarter)

    @classmethod
    def sum(cls, terms: Sequence[tuple[float, "Spread"]]) -> "Spread":
        """Of a weighted sum of figures on the same halves."""
        half, middle = (
            sum(weight * getattr(spread, part) for weight, spread in terms)
            for part in ("half", "middle")
        )
        units = min(spread.units for _, spread in terms)
        if len({len(spread.quarter) for _, spread in terms}) > 1:
            return cls(half, middle, units)
        return cls(half, middle, units, sum(weight * spread.quarter for weight, spread in terms))

    def variance(self, kind: Kind) -> float:
        """The variance of the figure of all pictures."""
        total = float(np.mean(self.half**2))
        if kind == "share":
            return total
        if kind == "concentrated":
            return total * self.slowness()
        second = self.second_order()
        if kind == "local":
            return total + second
        return second + max(total - 2 * second, 0.0)

    def second_order(self) -> float:
        """c, the variance of the part of second order."""
        return float(np.var(self.middle, ddof=1)) if len(self.middle) > 1 else 0.0

    def slowness(self) -> float:
        """2 E L^2 / E Q^2, between 1 (the variance falls as 1 / n) and 2 (it does not fall)."""
        quarter = float(np.mean(self.quarter**2)) if len(self.quarter) else 0.0
        if quarter == 0.0:
            return 1.0
        return min(max(2 * float(np.mean(self.half**2)) / quarter, 1.0), 2.0)

    def degrees(self, kind: Kind) -> float:
        """Degrees of freedom of `variance`, by the scatter of its terms over halvings.

        No more than units less one: of two prompts every halving is the same.
        """
        terms = self.half**2
        if kind in ("smooth", "distance"):
            # Where a is 0 only c is left, and its own scatter counts.
            second = (self.middle - self.middle.mean()) ** 2
            terms = terms - second if terms.mean() > 2 * second.mean() else second
        noise = _noise(terms)
        if kind == "concentrated" and len(self.quarter):
            noise = 4 * noise + _noise(self.quarter**2)  # of the square of one over the other
        return min(2 / noise if noise > 0 else math.inf, max(self.units - 1, 1))


def halves(
    count: int,
    replicates: int,
    seed: int,
    side: int = 0,
    strata: torch.Tensor | None = None,
    clusters: torch.Tensor | None = None,
    *,
    quartered: bool = False,
) -> torch.Tensor:
    """Random halves of rows and then their complements, (2 replicates, count) bool.

    A function of its arguments, so two figures of the same rows get the same halves.

    Args:
        side: 0 for real pictures, 1 for generated ones; their halves are independent.
        strata: (count,) int64, such as labels; each is halved. Pictures drawn with the classes in
            turn have no chance in how many there are of each, and halves must have none either.
        clusters: (count,) int64, such as the prompt of each picture; rows of one cluster stay
            together, and clusters are halved. Takes the place of strata.
        quartered: the same halves, each halved again: (4 replicates, count), all first quarters,
            then all second ones, which with the first make the halves, and so on.
    """
    if clusters is not None:
        _, cluster = torch.unique(clusters.cpu(), return_inverse=True)
        number = int(cluster.max()) + 1 if count else 0
        return halves(number, replicates, seed, side, quartered=quartered)[:, cluster]
    parts = 4 if quartered else 2
    position = np.arange(replicates, dtype=np.int64) + (side << 32)
    strata = torch.zeros(count, dtype=torch.int64) if strata is None else strata.cpu()
    _, stratum, sizes = torch.unique(strata, return_inverse=True, return_counts=True)
    number = len(sizes)
    words = bits(seed, Stream.HALF, position, count + number).astype(np.int64)
    of_rows, of_strata = torch.from_numpy(words).split([count, number], dim=1)
    first = sizes.cumsum(0) - sizes
    rank = torch.arange(count) - torch.repeat_interleave(first, sizes)
    # The running total is rounded, so that odd strata together lose no more than one row, over the
    # strata in random order, so that none of them always keeps the larger part.
    turn = of_strata.argsort(dim=1, stable=True)
    total = sizes[turn].cumsum(1)
    chosen = torch.zeros(replicates, count, dtype=torch.int64)
    for end in range(1, parts):
        ends = total * end // parts
        kept = torch.zeros(replicates, number, dtype=torch.int64)
        kept.scatter_(1, turn, torch.diff(ends, dim=1, prepend=torch.zeros_like(ends[:, :1])))
        chosen += rank >= torch.repeat_interleave(kept, sizes, dim=1)
    order = (of_rows + (stratum << 32)).argsort(dim=1, stable=True)
    part = torch.zeros_like(chosen).scatter_(1, order, chosen)
    return torch.cat([part == number for number in range(parts)])


def interval(
    name: str,
    value: float,
    drawn: np.ndarray,
    config: IntervalConfig,
    *,
    kind: Kind = "smooth",
    count: int = 0,
    units: float = math.inf,
    quarters: np.ndarray | None = None,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> Interval:
    """The interval of one figure.

    Args:
        name: the figure; a name in `PROPORTIONS` always gets a score interval, which stays between
            no row and every row, and has width where every half gives the same.
        drawn: the figure's values (2 R,) on halves and on their complements.
        count: for a proportion, the rows that it is a share of.
        units, quarters: as of `Spread.of`.
        at_least, at_most: the smallest and the largest value that the figure can have.
    """
    if not config.replicates or not len(drawn):
        return Interval(value, None, None, None, config.level, "none")
    kind = kind_of(name, kind)
    spread = Spread.of(value, drawn, units, quarters, name=name, count=count)
    degrees = spread.degrees(kind)
    error, z = spread.variance(kind) ** 0.5, quantile(config.level, degrees)
    if name in PROPORTIONS:
        one = PROPORTIONS[name]
        low, high = (one * end for end in _score_interval(value / one, error / one, count, z))
    elif kind == "distance":
        low, high = _distance_interval(value, spread, z)
    else:
        low, high = value - z * error, value + z * error
    low, high = (min(max(end, at_least), at_most) for end in (low, high))
    error = max(error, least_variance(name, count) ** 0.5)
    return Interval(
        value, low, high, error, config.level, "halves", degrees_of_freedom=_finite(degrees)
    )


def kind_of(name: str, kind: Kind) -> Kind:
    """The kind of one figure of a metric of that kind: "local" proportions are "share"."""
    return "share" if name in PROPORTIONS and kind != "concentrated" else kind


def least_variance(name: str, count: int) -> float:
    """What the variance of a share of `count` rows is at least, 0 for any other figure.

    That of a share of 0 or 1, whose halves show none; of less than about two rows in `count`.
    """
    if name not in PROPORTIONS or not count:
        return 0.0
    share = _shrunk(1.0, count)
    return PROPORTIONS[name] ** 2 * share * (1 - share) / count


def quantile(level: float, degrees: float = math.inf) -> float:
    """Half the width of Student's central interval at `level`, in standard errors."""
    return float(stats.t.ppf((1 + level) / 2, degrees))


def proportion(value: float, count: int, config: IntervalConfig) -> Interval:
    """The score interval of a share of `count` independent rows; needs no replicates."""
    z = quantile(config.level)
    low, high = _score_interval(value, 0.0, count, z)
    error = max(value * (1 - value) / count, least_variance("precision", count)) ** 0.5
    return Interval(value, max(low, 0.0), min(high, 1.0), error, config.level, "score")


def _distance_interval(value: float, spread: Spread, z: float) -> tuple[float, float]:
    """Ends t of (T - t)^2 <= z^2 (c + s (t - T_0)); below T_0 the variance stays c."""
    second, equal = spread.second_order(), float(spread.middle.mean())
    total, excess = float(np.mean(spread.half**2)), value - equal
    if second <= 1e-12 * total:  # draws by influence have none but their rounding
        half = z * total**0.5
        return value - half, value + half
    cubes = float(np.mean((spread.middle - equal) ** 3))
    # One squared normal has the largest skewness, 8^(1/2), and so the least V.
    mean = 2 * second**2 / max(cubes, second**1.5 / 4)
    mean = max(mean, (second / 2) ** 0.5)
    if excess > 0.0:
        far = excess**2 / (excess**2 + z * z * second)
        first = max(total - 2 * second, 1e-3 * total)
        mean += far * max(2 * second * excess / first - mean, 0.0)
    slope = total / max(excess + mean, mean / 10)
    centre = excess + z * z * slope / 2
    root = max(centre * centre - excess * excess + z * z * second, 0.0) ** 0.5
    low, high = centre - root, centre + root
    if low < 0.0:
        low = min(excess - z * second**0.5, 0.0)
    if high < 0.0:
        high = excess + z * second**0.5
    return equal + low, equal + high


def _score_interval(share: float, error: float, count: int, z: float) -> tuple[float, float]:
    """Wilson's interval with the number of independent rows that the standard error implies."""
    # Drawn towards one half as the interval's centre is: at a share of 1 the plain variance is 0.
    shrunk = (share * count + z * z / 2) / (count + z * z)
    implied = shrunk * (1 - shrunk) / error**2 if error > 0 else count
    rows, variance = max(min(count, implied), 1.0), share * (1 - share)
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * (variance / rows + z * z / (4 * rows * rows)) ** 0.5
    return centre - half, centre + half


def _scale(name: str, value: float, drawn: np.ndarray, count: int) -> float:
    """Root of p (1 - p) of a proportion over that of its values on subsets."""
    found = (value, float(np.mean(drawn)))
    whole, part = (
        share * (1 - share) for share in (_shrunk(v / PROPORTIONS[name], count) for v in found)
    )
    return (whole / part) ** 0.5


def _noise(terms: np.ndarray) -> float:
    """The relative variance of the mean of terms (R,)."""
    if len(terms) < 2 or not terms.any():
        return 0.0
    return float(np.var(terms, ddof=1)) / len(terms) / float(terms.mean()) ** 2


def _shrunk(share: float, count: int) -> float:
    """Drawn towards one half by four rows, so that a share of 1 has a variance."""
    return (share * count + 2) / (count + 4)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
