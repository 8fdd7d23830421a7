"""Every figure of two sets of features, of any subsets of their rows, with its interval.

Called by evaluation/plan.py and compare.py. A family gives, for R pairs of subsets at once, the
values of its figures; the figure at full size is the one subset that keeps all rows. Adding a
metric: a function of the shape of `_frechet` here, its entry in `FAMILIES`, and its name in
plan.py's `Metric`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from .frechet import frechet_distance, frechet_name
from .intervals import Interval, IntervalConfig, interval, kept_rows, shares
from .kid import kid_of_subsets
from .prdc import METRICS, Neighbourhoods

Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Pair:
    """Real features (N, D) and generated features (M, D) of one extractor, and k.

    With labels (N,) and (M,) int64 the class shares of both sides count as given, not as drawn.
    """

    real: torch.Tensor
    generated: torch.Tensor
    extractor: str
    k: int = 5
    real_labels: torch.Tensor | None = None
    generated_labels: torch.Tensor | None = None

    def everything(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The one subset that keeps all rows: (1, N) and (1, M) bool."""
        return tuple(
            torch.ones(1, len(side), dtype=torch.bool) for side in (self.real, self.generated)
        )


@dataclass(frozen=True)
class Family:
    """Figures that are computed together.

    Attributes:
        kind: what `intervals.shares` needs to know.
        values: (pair, share, kept real (R, N), kept generated (R, M)) -> name -> (R,) float64.
        at_least: the smallest value that the figures can have.
    """

    kind: Literal["smooth", "local"]
    values: Callable[[Pair, float, torch.Tensor, torch.Tensor], Values]
    at_least: float = -math.inf


def kernel_name(extractor: str) -> str:
    """KID for Inception features alone, else the features are named."""
    return "KID" if extractor == "inception" else f"kernel distance ({extractor} features)"


def _frechet(pair: Pair, share: float, real: torch.Tensor, generated: torch.Tensor) -> Values:
    found = [
        frechet_distance(pair.real[one], pair.generated[two], warn=False)
        for one, two in zip(real, generated, strict=True)
    ]
    return {frechet_name(pair.extractor): np.array(found)}


def _kid(pair: Pair, share: float, real: torch.Tensor, generated: torch.Tensor) -> Values:
    found = kid_of_subsets(pair.real, pair.generated, real, generated)
    return {kernel_name(pair.extractor): found.cpu().numpy()}


def _prdc(pair: Pair, share: float, real: torch.Tensor, generated: torch.Tensor) -> Values:
    near = Neighbourhoods.of(pair.real, pair.generated, pair.k, kept_share=share)
    found = [near.values(one, two) for one, two in zip(real, generated, strict=True)]
    return {name: np.array([values[name] for values in found]) for name in METRICS}


FAMILIES = {
    "frechet": Family("smooth", _frechet, at_least=0.0),
    "kid": Family("smooth", _kid),
    "prdc": Family("local", _prdc, at_least=0.0),
}
LOWER_IS_BETTER = ("FID", "KID", "Fréchet", "kernel")


def measure(
    pair: Pair, metrics: list[str], config: IntervalConfig, seed: int = 0
) -> dict[str, Interval]:
    """Every figure of the named families with its interval, by the figure's name."""
    found = {}
    for metric in metrics:
        family = FAMILIES[metric]
        values = family.values(pair, 1.0, *pair.everything())
        drawn = _replicates(pair, family, config, seed)
        for name, value in values.items():
            count = len(pair.real) if name in ("recall", "coverage") else len(pair.generated)
            of_name = {share: of_share[name] for share, of_share in drawn.items()}
            found[name] = interval(
                name,
                float(value[0]),
                of_name,
                config,
                kind=family.kind,
                count=count,
                at_least=family.at_least,
            )
    return found


def measure_difference(
    a: Pair, b: Pair, metrics: list[str], config: IntervalConfig, *, paired: bool, seed: int = 0
) -> dict[str, Interval]:
    """Figure of b minus figure of a, with the interval of the difference, by the figure's name.

    Both have the same real features and lose the same real rows in every replicate, so what the
    choice of reference adds to both cancels.

    Args:
        paired: row i of both generated sets was drawn from the same seed and label; the same
            generated rows are then kept, and what the seeds add to both cancels too.
    """
    found = {}
    for metric in metrics:
        family = FAMILIES[metric]
        values = [family.values(pair, 1.0, *pair.everything()) for pair in (a, b)]
        drawn_a = _replicates(a, family, config, seed)
        drawn_b = _replicates(b, family, config, seed, side=1 if paired else 2)
        for name in values[0]:
            difference = float(values[1][name][0] - values[0][name][0])
            of_name = {share: drawn_b[share][name] - drawn_a[share][name] for share in drawn_a}
            label = f"difference of {name}"  # a difference is not a proportion
            found[name] = interval(label, difference, of_name, config, kind=family.kind)
    return found


def _replicates(
    pair: Pair, family: Family, config: IntervalConfig, seed: int, side: int = 1
) -> dict[float, Values]:
    if not config.replicates:
        return {}
    fewest = min(len(pair.real), len(pair.generated))
    found = {}
    for share in shares(family.kind, config.method, pair.real.shape[1] / fewest):
        common = {"share": share, "replicates": config.replicates, "seed": seed}
        real = kept_rows(len(pair.real), **common, strata=pair.real_labels)
        generated = kept_rows(
            len(pair.generated), **common, side=side, strata=pair.generated_labels
        )
        found[share] = family.values(pair, share, real, generated)
    return found
