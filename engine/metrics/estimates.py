"""A figure with what its interval and every comparison of it is made from; called by evaluation/.

An `Estimate` keeps the figure's values on random halves of the pictures (intervals.py says why).
Halves are the same for every estimate of equal numbers of pictures and one seed, so differences of
two estimates, halving by halving, know what both have in common: the reference, and pictures that
were drawn from the same seeds. For independent pictures the common halves add nothing. Means of
scores of pictures keep the error of each unit too, from which their variances are exact.
"""

import hashlib
import io
import json
import math
from dataclasses import dataclass, field

import numpy as np

from etude.core.rng import Stream, normal

from .intervals import (
    HALF,
    QUARTER,
    Interval,
    IntervalConfig,
    Kind,
    Spread,
    interval,
    kind_of,
    least_variance,
    quantile,
)


@dataclass(frozen=True)
class Estimate:
    """A figure of a set of pictures.

    Attributes:
        replicates: {0.5: (2 R,) float64}, the values on R random halves, then on their complements,
            and where the kind asks for them {0.25: (4 R,)} on the quarters; empty where nothing is
            known of the error.
        kind: as in `registry.Metric`.
        at_least, at_most: the smallest and the largest value that the figure can have.
        count: for a proportion, the rows that it is a share of; else 0.
        units: independent pictures, or prompts, of the side that has fewer.
        drawn_by: what fixes the halves of generated pictures (numbers, labels, seed) as text;
            estimates with equal ones are compared halving by halving.
        errors: of a mean, (G,) float64, what each of G independent units adds to its error; their
            sum of squares, times G / (G - 1), is the variance.
    """

    name: str
    value: float
    replicates: dict[float, np.ndarray] = field(default_factory=dict)
    kind: Kind = "smooth"
    count: int = 0
    units: float = math.inf
    at_least: float = -math.inf
    at_most: float = math.inf
    drawn_by: str = ""
    errors: np.ndarray | None = None

    @property
    def drawn(self) -> np.ndarray:
        """The values on halves and on their complements, (2 R,)."""
        return np.asarray(self.replicates.get(HALF, ()), np.float64)

    @property
    def spread(self) -> Spread:
        """What the halvings say of its error."""
        return Spread.of(
            self.value,
            self.drawn,
            self.units,
            self.replicates.get(QUARTER),
            name=self.name,
            count=self.count,
        )

    def interval(self, config: IntervalConfig) -> Interval:
        """The interval for the expected value of the figure at this number of pictures."""
        if self.errors is not None and config.replicates:
            degrees = len(self.errors) - 1
            error = root_of_errors(self.errors)
            half = quantile(config.level, degrees) * error
            low = max(self.value - half, self.at_least)
            high = min(self.value + half, self.at_most)
            return Interval(
                self.value, low, high, error, config.level, "mean", degrees_of_freedom=degrees
            )
        return interval(
            self.name,
            self.value,
            self.drawn,
            config,
            kind=self.kind,
            count=self.count,
            units=self.units,
            quarters=self.replicates.get(QUARTER),
            at_least=self.at_least,
            at_most=self.at_most,
        )

    def standard_error(self) -> float:
        """Standard deviation of the figure over fresh draws; nan where nothing is known of it."""
        found = self.interval(IntervalConfig()).standard_error
        return math.nan if found is None else found

    def unseen(self) -> float:
        """By how much the variance is larger than halves say: for proportions near 0 and 1."""
        seen = self.spread.variance(kind_of(self.name, self.kind)) if len(self.drawn) else 0.0
        return max(least_variance(self.name, self.count) - seen, 0.0)

    def draws(self) -> np.ndarray:
        """Joint draws around the value, (2 R,) float64; (0,) where nothing is known of the error.

        The value plus and minus half of the differences of halves, brought to the standard error;
        normal numbers of its own where all halves of a proportion are alike.
        Draw r of two estimates with equal `drawn_by` comes from the same halving, so differences
        and orders of draws count what the estimates share.
        """
        half = self.spread.half
        if not half.any() and len(half) and self.unseen() > 0.0:
            about = repr((self.name, self.value, self.count, self.drawn_by)).encode()
            seed = int.from_bytes(hashlib.sha256(about).digest()[:4], "big")
            positions = np.arange(len(half))
            half = normal(seed, Stream.DRAW_OF_INTERVAL, positions, ()).double().numpy()
        size = float(np.mean(half**2)) ** 0.5 if len(half) else 0.0
        if size == 0.0:
            return np.full(2 * len(half), self.value)
        moved = half * (self.standard_error() / size)
        return self.value + np.concatenate([moved, -moved])

    def to_bytes(self) -> bytes:
        """An npz file of the arrays, with the rest as JSON text in `about`."""
        about = {
            "name": self.name,
            "value": self.value,
            "kind": self.kind,
            "count": self.count,
            "units": self.units if math.isfinite(self.units) else None,
            "at_least": self.at_least if math.isfinite(self.at_least) else None,
            "at_most": self.at_most if math.isfinite(self.at_most) else None,
            "drawn_by": self.drawn_by,
            "shares": list(self.replicates),
        }
        arrays = {f"share_{i}": drawn for i, drawn in enumerate(self.replicates.values())}
        if self.errors is not None:
            arrays["errors"] = self.errors
        stream = io.BytesIO()
        np.savez(stream, about=np.array(json.dumps(about)), **arrays)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Estimate":
        """What `to_bytes` wrote."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            shares = about.pop("shares")
            replicates = {share: arrays[f"share_{i}"] for i, share in enumerate(shares)}
            errors = arrays["errors"] if "errors" in arrays else None
        about = {k: v for k, v in about.items() if v is not None}  # what is infinite
        return cls(**about, replicates=replicates, errors=errors)


def root_of_errors(errors: np.ndarray) -> float:
    """The standard error from what each of G independent units adds to the error, (G,)."""
    return float((np.square(errors).sum() * len(errors) / (len(errors) - 1)) ** 0.5)
