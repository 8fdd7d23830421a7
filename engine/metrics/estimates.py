"""A figure with what its interval and every comparison of it is made from; called by evaluation/.

An `Estimate` keeps the figure's values on subsets of the rows (intervals.py says which). Subsets
are the same for every estimate of equal numbers of pictures and one seed, so differences of two
estimates, subset by subset, know what both have in common: the reference, and pictures that were
drawn from the same seeds. For independent pictures the common subsets add nothing.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .intervals import Interval, IntervalConfig, interval


@dataclass(frozen=True)
class Estimate:
    """A figure, and its values (R,) float64 on R subsets per share of kept rows.

    Attributes:
        kind, at_least: as in `registry.Metric`.
        count: for a proportion, the rows that it is a share of; else 0.
        drawn_by: what fixes the subsets (numbers of rows, labels, seed, shares) as text; estimates
            with equal ones are compared subset by subset.
    """

    name: str
    value: float
    replicates: dict[float, np.ndarray] = field(default_factory=dict)
    kind: Literal["smooth", "local"] = "smooth"
    count: int = 0
    at_least: float = -math.inf
    drawn_by: str = ""

    def interval(self, config: IntervalConfig) -> Interval:
        """The interval for the expected value of the figure at this number of pictures."""
        if not self.replicates:
            return Interval(self.value, None, None, None, config.level, "none")
        return interval(
            self.name,
            self.value,
            self.replicates,
            config,
            kind=self.kind,
            count=self.count,
            at_least=self.at_least,
        )
