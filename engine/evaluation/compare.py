"""Is one generator better than another? Two results of plan.py, compared only like with like.

Figures with intervals that overlap may still differ significantly, because both were measured with
the same reference and, often, the same seeds. With the store at hand the interval is that of the
difference, with the same rows deleted on both sides (metrics/figures.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from etude.core.errors import UserError
from etude.core.log import Log
from etude.metrics.figures import LOWER_IS_BETTER, Pair, measure_difference
from etude.metrics.intervals import Interval, IntervalConfig
from etude.metrics.store import FeatureStore

from .protocol import Protocol, refuse_difference


@dataclass(frozen=True)
class Comparison:
    """Differences b - a by figure, and whether rows were paired by seed and label."""

    a: str
    b: str
    differences: dict[str, Interval]
    paired: bool

    def better(self, figure: str) -> str | None:
        """The name of the better side, or None where the interval holds zero or is missing."""
        found = self.differences[figure]
        if found.low is None or found.low <= 0.0 <= found.high:
            return None
        lower = figure.startswith(LOWER_IS_BETTER)
        return self.b if (found.value < 0) == lower else self.a

    def table(self, log: Log) -> None:
        """Show the differences."""
        rows = [
            [name, str(found), self.better(name) or "not decided"]
            for name, found in self.differences.items()
        ]
        how = "same seeds and labels" if self.paired else "independent pictures"
        title = f"{self.b} minus {self.a} ({how})"
        log.table(title, ["figure", "difference", "better"], rows)


def compare(
    a: dict,
    b: dict,
    *,
    store: FeatureStore | None = None,
    interval: IntervalConfig | None = None,
    except_fields: Iterable[str] = (),
    seed: int = 0,
) -> Comparison:
    """Compare two results of `evaluate`.

    Args:
        a, b: what `evaluate` returned, or result.json read back.
        store: where their features are; without it only the differences are given.
        interval: of the differences; by default the 95% jackknife.
        except_fields: protocol fields whose difference is the point, such as ("guidance",).

    Raises:
        UserError: the protocols differ in another field; the fields are named.
    """
    first, second = (Protocol.from_dict(result["protocol"]) for result in (a, b))
    refuse_difference(first, second, except_fields)
    names = a["generated"]["name"], b["generated"]["name"]
    if names[0] == names[1]:
        names = f"{names[0]} (first)", f"{names[1]} (second)"
    if store is None:
        return Comparison(*names, _plain_differences(a, b), paired=False)
    real, one, two = (
        store.load(digest)
        for digest in (a["sets"]["real"], a["sets"]["generated"], b["sets"]["generated"])
    )
    paired = one.keys == two.keys and bool((one.labels == two.labels).all())
    pairs = [
        Pair(real.features, side.features, first.extractor, first.k, real.labels, side.labels)
        for side in (one, two)
    ]
    metrics = [metric for metric in a["metrics"] if metric in b["metrics"]]
    config = interval or IntervalConfig()
    found = measure_difference(*pairs, metrics, config, paired=paired, seed=seed)
    return Comparison(*names, found, paired)


def _plain_differences(a: dict, b: dict) -> dict[str, Interval]:
    shared = [name for name in a["figures"] if name in b["figures"]]
    if not shared:
        raise UserError("these results have no figure in common; evaluate the same metrics")
    values = {
        name: b["figures"][name]["generated"]["value"] - a["figures"][name]["generated"]["value"]
        for name in shared
    }
    return {n: Interval(v, None, None, None, 0.0, "none") for n, v in values.items()}
