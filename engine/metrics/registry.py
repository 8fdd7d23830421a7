"""What a metric of two sets of features is, and the metrics by name.

A metric gives, for R pairs of subsets of the rows at once, the values of its figures. The figure at
full size is the one subset that keeps all rows; the others make its interval (estimates.py). A new
metric is one file in this folder, or anywhere, with a function under `@metric(...)`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from etude.core.config import Config
from etude.core.errors import UserError
from etude.core.registry import Registry

from .checked import options_of

Values = dict[str, np.ndarray]
AnyConfig = TypeVar("AnyConfig", bound=Config)
Influences = dict[str, tuple[torch.Tensor, torch.Tensor]]


class NoOptions(Config):
    """Options of a metric that has none."""


@dataclass(frozen=True)
class Pair:
    """Real features (N, D) and generated features (M, D) of one kind, and the metric's options.

    With labels (N,) and (M,) int64 the class shares of both sides count as given, not as drawn.
    With `generated_prompts` (M,) int64 the pictures of one prompt stand or fall together, and
    prompts count as drawn.

    Attributes:
        features: what they are, "inception" or "dinov2/cls": the extractor, and the tap where it
            is not the extractor's first.
        options: the metric's own `Options`, or a mapping of their names to values.

    Raises:
        UserError: there is not one label or prompt a picture.
    """

    real: torch.Tensor
    generated: torch.Tensor
    features: str
    options: Config | Mapping[str, Any] = field(default_factory=NoOptions)
    real_labels: torch.Tensor | None = None
    generated_labels: torch.Tensor | None = None
    generated_prompts: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, rows in (
            ("real_labels", self.real),
            ("generated_labels", self.generated),
            ("generated_prompts", self.generated),
        ):
            given = getattr(self, name)
            if given is not None and len(given) != len(rows):
                raise UserError(
                    f"{name} has {len(given)} numbers for {len(rows)} pictures; give one a picture"
                )

    def options_as(self, kind: type[AnyConfig]) -> AnyConfig:
        """The options of this kind, made of a mapping where they are one; defaults of none.

        Raises:
            UserError: they are another metric's, or not what this kind has.
        """
        if isinstance(self.options, kind):
            return self.options
        if isinstance(self.options, NoOptions):
            return kind()
        if isinstance(self.options, Mapping):
            return options_of(kind, "options", self.options)
        given = type(self.options).__name__
        raise UserError(f"the options are {given}, and {kind.__name__} are needed: give these")

    def everything(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The one subset that keeps all rows: (1, N) and (1, M) bool."""
        return tuple(
            torch.ones(1, len(side), dtype=torch.bool) for side in (self.real, self.generated)
        )


@dataclass(frozen=True)
class Metric:
    """Figures that are computed together.

    Attributes:
        values: (pair, share, kept real (R, N), kept generated (R, M)) -> figure -> (R,) float64;
            `share` is the share of rows that every subset keeps.
        features: the features it takes where nobody says which.
        better: "lower" or "higher", by figure where they differ.
        kind: "smooth" for functions of moments and of all pairs of rows, "distance" for those that
            are least where both sides are equal and grow as a square from there, "local" for
            nearest neighbours, "concentrated" for shares of rows that may hang on a few rows of the
            other side; decides how intervals are made (intervals.py).
        at_least: the smallest value that the figures can have.
        needs_real: False for what looks at generated pictures alone (its real side may be empty).
        options: the section of a recipe that holds its options.
        influences: (pair, kept real (N,), kept generated (M,)) -> figure -> (N,) and (M,) float64,
            M or N times the derivative of the figure of the kept rows along the weight of each row,
            kept or not, up to a constant a side; for figures that cost too much to be computed on
            many subsets (figures.py).
        enough: (options, dimensions) -> the fewest pictures of a side that the figure is worth
            something with, and why.
        least: (options, share) -> the fewest pictures of a side that it can be computed of at all,
            of the whole set (share 1) and of its halves, without which there is no interval, and
            quarters.
        check: given the name of features, `UserError` where the figure cannot be made of them.
    """

    name: str
    values: Callable[[Pair, float, torch.Tensor, torch.Tensor], Values]
    features: str
    better: Literal["lower", "higher"] | Mapping[str, Literal["lower", "higher"]]
    kind: Literal["smooth", "local", "distance", "concentrated"] = "smooth"
    at_least: float = -math.inf
    needs_real: bool = True
    options: type[Config] = NoOptions
    influences: Callable[[Pair, torch.Tensor, torch.Tensor], Influences] | None = None
    enough: Callable[[Config, int], tuple[int, str]] | None = None
    least: Callable[[Config, float], int] = lambda options, share: 2
    check: Callable[[str], Any] = lambda features: None

    def better_of(self, figure: str) -> Literal["lower", "higher"]:
        """Which side of a figure is the good one."""
        return self.better if isinstance(self.better, str) else self.better[figure]


METRICS: Registry[Metric] = Registry("metric", "etude.metrics", "etude.metrics")


def metric(name: str, **about: Any) -> Callable:
    """The decorator of a metric's function; `about` are the fields of `Metric`."""

    def register(values: Callable) -> Callable:
        METRICS.add(name, Metric(name, values, **about))
        return values

    return register


def open_metric(spec: str) -> tuple[Metric, str]:
    """A metric and its features from "frechet" or "frechet@dinov2".

    Raises:
        UserError: there is no such metric, or nothing follows the @.
    """
    name, at, features = spec.partition("@")
    if at and not features:
        raise UserError(f"{spec!r} names no features: write {name}@EXTRACTOR, or {name} alone")
    found = METRICS.get(name)
    return found, features or found.features
