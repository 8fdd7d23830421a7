"""Is one generator better than another? Two results of plan.py, compared only like with like.

Figures with intervals that overlap may still differ significantly, because both were measured with
the same reference and, often, the same seeds. With the store at hand the interval is that of the
difference, from the same halves of both sides (metrics/comparing.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from etude.core.config import Config
from etude.core.errors import UserError
from etude.core.log import Log
from etude.metrics.comparing import difference, with_holm
from etude.metrics.figures import measure
from etude.metrics.intervals import Interval, IntervalConfig
from etude.metrics.registry import METRICS, Pair
from etude.metrics.store import FeatureSet, FeatureStore

from .protocol import Protocol, refuse_difference


@dataclass(frozen=True)
class Comparison:
    """Differences b - a by figure, and whether rows were paired by seed and label.

    Every difference has its p-value, and Holm's against the other figures.
    """

    a: str
    b: str
    differences: dict[str, Interval]
    paired: bool
    lower_is_better: dict[str, bool] = field(default_factory=dict)

    def better(self, figure: str) -> str | None:
        """The name of the better side, or None where Holm's p-value, held against the other
        figures, does not decide, or there is none.
        """
        found = self.differences[figure]
        if found.adjusted_p_value is None or found.adjusted_p_value > 1.0 - found.level:
            return None
        lower = self.lower_is_better.get(figure, False)
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
        interval: of the differences; by default at 95%.
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
    config, found, lower = interval or IntervalConfig(), {}, {}
    for name in (metric for metric in a["metrics"] if metric in b["metrics"]):
        metric = METRICS.get(name)
        options = metric.options(k=first.k) if name == "prdc" else metric.options()
        estimates = [
            measure(_pair(real, side, first.extractor, options), metric, config, seed)
            for side in (one, two)
        ]
        for figure, of_a in estimates[0].items():
            found[figure] = difference(estimates[1][figure], of_a, config)
            lower[figure] = metric.better_of(figure) == "lower"
    return Comparison(*names, with_holm(found), paired, lower)


def _pair(real: FeatureSet, side: FeatureSet, features: str, options: Config) -> Pair:
    labels = {"real_labels": real.labels, "generated_labels": side.labels}
    return Pair(real.features, side.features, features, options, **labels)


def _plain_differences(a: dict, b: dict) -> dict[str, Interval]:
    shared = [name for name in a["figures"] if name in b["figures"]]
    if not shared:
        raise UserError("these results have no figure in common; evaluate the same metrics")
    values = {
        name: b["figures"][name]["generated"]["value"] - a["figures"][name]["generated"]["value"]
        for name in shared
    }
    return {n: Interval(v, None, None, None, 0.0, "none") for n, v in values.items()}
