"""Which figures have too few pictures, how many they need, and why.

Called by evaluation/plan.py and evaluation/planned/running.py.
"""

from dataclasses import dataclass

from etude.core.config import Config

from .registry import Metric

FEWEST = 50  # pictures below which no interval made from halves is worth much


@dataclass(frozen=True)
class Shortage:
    """A metric with fewer pictures on one side than it needs.

    Attributes:
        side: "real" or "generated".
    """

    metric: str
    side: str
    count: int
    needed: int
    why: str

    def __str__(self) -> str:
        return (
            f"{self.metric}: {self.count} {self.side} pictures, at least {self.needed} wanted: "
            f"{self.why}"
        )


def shortages(
    metric: Metric, options: Config, dim: int, real: int, generated: int
) -> list[Shortage]:
    """What is short for a metric of features of `dim` dimensions with so many pictures a side."""
    rules = [(FEWEST, "an interval from random halves is not worth much with fewer")]
    if metric.enough is not None:
        rules.append(metric.enough(options, dim))
    needed, why = max(rules)
    counts = {"real": real, "generated": generated}
    if not metric.needs_real:
        del counts["real"]
    return [
        Shortage(metric.name, side, count, needed, why)
        for side, count in counts.items()
        if count < needed
    ]
