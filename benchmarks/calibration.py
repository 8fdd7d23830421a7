"""Do intervals of 95% cover 95%, and are equal models told apart in no more than 5%? By simulation.

    python -m benchmarks.calibration [--trials 1000] [--only frechet kid] [--halvings 60]

For each family of figures and each setting: pairs of a real and a generated set are drawn afresh
from known distributions, `trials` times, measured as an evaluation does (metrics/figures.py), and
the interval of every figure is held against the figure's mean over all trials. A second generated
set of the same distribution stands for a model that is equally good: how often the difference of
the two has a p-value below 5% is the false-different rate. Settings are "equal" (the generated set
has the distribution of the real one), "near" and "apart". Appends a row a figure and setting to
results/calibration.jsonl. About 20 minutes on one quiet core; a test of seconds is
tests/metrics/test_intervals.py.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from etude.metrics.comparing import difference
from etude.metrics.estimates import Estimate
from etude.metrics.figures import mean_of_scores, measure
from etude.metrics.intervals import IntervalConfig
from etude.metrics.registry import METRICS, Pair

from .results import append, machine

_COSTLY = ("prdc", "mind", "fd_infinity", "authenticity")
SHIFTS = {"equal": 0.0, "near": 0.15, "apart": 1.0}


@dataclass(frozen=True)
class Setting:
    """Features of n rows a side in d dimensions, drawn `shift` away from the real ones."""

    metric: str
    name: str
    rows: int
    dim: int
    options: tuple[tuple[str, Any], ...] = ()

    def sides(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Real features and those of two equally good models, (n, d) float32 each."""
        shift = SHIFTS[self.name]
        # Spectra of features decay; the mean is not zero, as behind a rectifier.
        scale = (1.0 + np.arange(self.dim)) ** -0.5
        moved = scale[0] * shift / self.dim**0.5
        real, a, b = (rng.normal(size=(self.rows, self.dim)) * scale + 0.5 for _ in range(3))
        sides = real, a * (1 - shift / 2) + moved, b * (1 - shift / 2) + moved
        return tuple(torch.from_numpy(side).float() for side in sides)


def _settings() -> Iterator[Setting]:
    # Metric, rows, dimensions, and options that keep the time short.
    plan = (
        ("frechet", 500, 16, ()),
        ("frechet", 500, 32, ()),
        ("kid", 500, 16, ()),
        ("cmmd", 500, 16, ()),
        ("fd_infinity", 500, 4, (("points", 5),)),
        ("mind", 500, 16, (("directions", 16),)),
        ("prdc", 500, 16, ()),
        ("authenticity", 500, 16, ()),
    )
    for metric, rows, dim, options in plan:
        # Where a trial costs most the two ends stand for all.
        names = ("equal", "apart") if dim == 32 or metric in _COSTLY else SHIFTS
        for name in names:
            yield Setting(metric, name, rows, dim, options)
    for metric, rows, dim, options in (
        ("vendi", 500, 16, ()),
        ("inception_score", 1000, 10, (("splits", 2),)),
    ):
        yield Setting(metric, "apart", rows, dim, options)
    yield Setting("mean of scores", "apart", 600, 0)


def estimates(
    setting: Setting, config: IntervalConfig, rng: np.random.Generator, seed: int
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Every figure of two equally good models against one real set."""
    if setting.metric == "mean of scores":
        return tuple(_scores(setting.rows, config, rng, seed) for _ in range(2))
    metric = METRICS.get(setting.metric)
    options = metric.options(**dict(setting.options))
    real, *models = setting.sides(rng)
    return tuple(
        measure(Pair(real, one, metric.features, options), metric, config, seed) for one in models
    )


def _scores(
    rows: int, config: IntervalConfig, rng: np.random.Generator, seed: int
) -> dict[str, Estimate]:
    """Skewed scores of 3 pictures a prompt; a third of the variance is the prompt's."""
    prompts = np.repeat(np.arange(rows // 3), 3)
    scores = rng.gamma(2.0, size=rows // 3)[prompts] + rng.gamma(4.0, size=rows)
    return {"mean": mean_of_scores("mean", scores, config, prompts=prompts, seed=seed)}


def simulate(setting: Setting, trials: int, halvings: int, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each figure of a setting."""
    config = IntervalConfig(replicates=halvings)
    rng = np.random.default_rng([6, seed])
    began = time.process_time()
    found: dict[str, list[tuple[float, ...]]] = {}
    for trial in range(trials):
        a, b = estimates(setting, config, rng, trial)
        for name, one in a.items():
            interval, apart = one.interval(config), difference(b[name], one, config)
            found.setdefault(name, []).append(
                (interval.value, interval.low, interval.high, apart.p_value, apart.standard_error)
            )
            found[name][-1] += (apart.value,)
    seconds = time.process_time() - began
    return [_row(setting, name, np.array(of), halvings, seconds) for name, of in found.items()]


def _row(
    setting: Setting, figure: str, of: np.ndarray, halvings: int, seconds: float
) -> dict[str, Any]:
    value, low, high, p_value, error, apart = of.T
    truth = value.mean()
    return {
        "family": setting.metric,
        "figure": figure,
        "setting": setting.name,
        "n": setting.rows,
        "dimensions": setting.dim,
        "options": dict(setting.options),
        "trials": len(value),
        "halvings": halvings,
        "truth": round(float(truth), 6),
        "coverage": round(float(((low <= truth) & (truth <= high)).mean()), 4),
        "above": round(float((low > truth).mean()), 4),
        "below": round(float((high < truth).mean()), 4),
        "mean_width": round(float((high - low).mean()), 6),
        # Against the width that knowing the spread would give.
        "relative_width": _ratio(np.median(high - low), 3.92 * value.std(ddof=1)),
        "false_different": round(float((p_value < 0.05).mean()), 4),
        "relative_error_of_difference": _ratio(np.median(error), apart.std(ddof=1)),
        "seconds": round(seconds, 1),
    }


def _ratio(one: float, other: float) -> float | None:
    """None for a figure that never changes, as a precision of 1."""
    return round(float(one / other), 3) if other > 0 else None


def main(words: list[str] | None = None) -> None:
    """Simulate every setting, print and append its rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--halvings", type=int, default=60)
    parser.add_argument("--only", nargs="*", help="families, by the metric's name")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    for setting in _settings():
        if args.only and setting.metric not in args.only:
            continue
        for row in simulate(setting, args.trials, args.halvings):
            print(
                f"{row['family']:15} {row['figure'][:28]:28} {setting.name:6} n={setting.rows} "
                f"d={setting.dim} covers {row['coverage']:.3f} (-{row['above']:.3f} "
                f"+{row['below']:.3f}), width {row['relative_width']}, false different "
                f"{row['false_different']:.3f}, error {row['relative_error_of_difference']}, "
                f"{row['seconds']:.0f} s",
                flush=True,
            )
            append("calibration", [row | machine("cpu")])


if __name__ == "__main__":
    main()
