"""From features in the store to rows of the table, for one candidate on one data set.

Called by running.py. A figure has one row for all pictures and one for each group that has enough
of them on both sides. What fixes it beside the model is its protocol, whose fingerprint the row
carries: figures of different protocols are never compared.
"""

import datetime
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from etude.core.config import Config
from etude.core.environment import revision
from etude.metrics.alignment import Scorer
from etude.metrics.estimates import Estimate
from etude.metrics.extractors import Extractor, preprocessing
from etude.metrics.figures import mean_of_scores, measure
from etude.metrics.intervals import Interval, IntervalConfig
from etude.metrics.registry import Metric, Pair
from etude.metrics.store import FeatureSet, FeatureStore

from ..extract import feature_key
from ..picture_set import PictureSet
from ..results import Row
from .candidates import Candidate
from .folders import PromptedFolder

Found = tuple[Row, Estimate, dict[str, Any]]
FEWEST = 10  # pictures of a group on either side, below which it has no figures


@dataclass(frozen=True)
class Wanted:
    """One metric of a plan with the features it takes."""

    metric: Metric
    features: str
    options: Config


@dataclass(frozen=True)
class Sides:
    """The real and the drawn pictures of one candidate on one data set.

    Attributes:
        real: None where no metric looks at real pictures.
        prompts: fingerprint of what was asked for.
    """

    data_set: str
    real: PictureSet | None
    drawn: PictureSet
    prompts: str


class Features:
    """Features from the store, each set read once while it is in use."""

    def __init__(self, store: FeatureStore, extractors: Sequence[Extractor]) -> None:
        self.store = store
        self._owner = {name: one for one in extractors for name in one.dims}
        self._read: dict[tuple[str, str], FeatureSet] = {}

    def of(self, pictures: PictureSet, features: str) -> FeatureSet:
        """The features `features` of a set."""
        key = pictures.fingerprint, features
        if key not in self._read:
            at = feature_key(pictures, self._owner[features], features)
            self._read[key] = self.store.load(at)
        return self._read[key]

    def forget(self, pictures: PictureSet) -> None:
        """Give a set's memory back."""
        self._read = {k: v for k, v in self._read.items() if k[0] != pictures.fingerprint}

    def called(self, features: str) -> str:
        """What figures call these features."""
        return self._owner[features].called(features)

    def stated(self, features: str) -> dict[str, Any]:
        """What fixes the numbers of these features."""
        one = self._owner[features]
        return {
            "name": features,
            "version": one.version,
            "weights_sha256": one.weights_sha256,
            "arithmetic": one.arithmetic,
            "preprocessing": preprocessing(one),
        }


@functools.cache
def _revision() -> str:
    return revision() or ""


def template(candidate: Candidate, data_set: str, seed: int, selected: bool) -> Row:
    """A row of this candidate without a figure."""
    return Row(
        model=candidate.model,
        data_set=data_set,
        metric="",
        value=float("nan"),
        better="lower",
        checkpoint="" if candidate.checkpoint is None else str(candidate.checkpoint),
        images_seen=candidate.checkpoint,
        guidance=candidate.guidance,
        seed=seed,
        training_seed=candidate.config.training_seed,
        selected=selected,
        source=candidate.source,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S"),
        revision=_revision(),
    )


def measured(
    wanted: Wanted,
    sides: Sides,
    features: Features,
    row: Row,
    config: IntervalConfig,
    *,
    by_group: bool,
    seed: int,
    known: Callable[[Row], bool],
) -> Iterator[list[Found]]:
    """Every figure of a metric with its estimate and protocol: of all pictures, then by group.

    Args:
        row: what the figures are of, from `template`.
        known: whether figures of a row's model, features, group and protocol are in the table.
    """
    drawn = features.of(sides.drawn, wanted.features)
    looks_at_real = wanted.metric.needs_real
    real = features.of(sides.real, wanted.features) if looks_at_real else None
    fewest = max(FEWEST, wanted.metric.least(wanted.options, 1.0))
    for group in ["", *(_groups(real, drawn) if by_group else ())]:
        one, other = (_rows(side, group) if side is not None else None for side in (real, drawn))
        if group and min(len(side) for side in (one, other) if side is not None) < fewest:
            continue
        about = {
            "metric": wanted.metric.name,
            "options": wanted.options.model_dump(mode="json"),
            "features": features.stated(wanted.features),
        }
        protocol = _protocol(about, sides, group, one, other)
        begun = _begun(row, protocol, wanted.features, config)
        if known(begun):
            continue
        labels = _labels(other)
        pair = Pair(
            one.features if one is not None else other.features[:0],
            other.features,
            features.called(wanted.features),
            wanted.options,
            _labels(one),
            labels,
            _prompts(sides, drawn, group) if labels is None else None,
        )
        yield [
            (
                _filled(begun, name, wanted.metric.better_of(name), estimate.interval(config)),
                estimate,
                protocol,
            )
            for name, estimate in measure(pair, wanted.metric, config, seed).items()
        ]


def scored(
    scorer: Scorer,
    about: dict[str, Any],
    sides: Sides,
    scores: FeatureSet,
    row: Row,
    config: IntervalConfig,
    *,
    by_group: bool,
    seed: int,
    known: Callable[[Row], bool],
) -> Iterator[list[Found]]:
    """As `measured`, of a scorer's figures.

    Args:
        about: what fixes its numbers.
        scores: (M, figures), as scoring.py keeps them.
    """
    features = "" if scorer.needs == "picture" else scorer.needs
    for group in ["", *(_groups(None, scores) if by_group else ())]:
        here = _rows(scores, group)
        if group and len(here) < FEWEST:
            continue
        protocol = _protocol(about, sides, group, None, here)
        begun = _begun(row, protocol, features, config)
        if known(begun):
            continue
        prompts = _prompts(sides, scores, group)
        yield [
            (
                _filled(begun, name, scorer.better, estimate.interval(config)),
                estimate,
                protocol,
            )
            for name, column in zip(scorer.figures, here.features.T, strict=True)
            for estimate in [
                mean_of_scores(
                    name,
                    column,
                    config,
                    prompts=prompts,
                    at_least=scorer.at_least,
                    at_most=scorer.at_most,
                    seed=seed,
                )
            ]
        ]


def _begun(row: Row, protocol: dict[str, Any], features: str, config: IntervalConfig) -> Row:
    """A row with everything but its figure."""
    fingerprint = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()
    return replace(
        row,
        group=protocol["group"],
        features=features,
        level=config.level,
        n_real=protocol["n_real"],
        n_generated=protocol["n_generated"],
        protocol=fingerprint[:16],
    )


def _filled(row: Row, name: str, better: str, found: Interval) -> Row:
    return replace(
        row,
        metric=name,
        value=found.value,
        low=found.low,
        high=found.high,
        standard_error=found.standard_error,
        better=better,
    )


def _prompts(sides: Sides, drawn: FeatureSet, group: str) -> torch.Tensor | None:
    """The prompt of each picture of a group, where some prompt has several pictures."""
    if isinstance(sides.drawn, PromptedFolder) and not sides.drawn.knows_prompts:
        return None
    ids = [prompt.id for prompt in sides.drawn.asked(0, len(drawn))]
    kept = [i for i, one in zip(ids, drawn.groups, strict=True) if group in ("", one)]
    places = {one: place for place, one in enumerate(dict.fromkeys(kept))}
    if len(places) == len(kept):
        return None
    return torch.tensor([places[one] for one in kept])


def _groups(real: FeatureSet | None, drawn: FeatureSet) -> list[str]:
    """Groups that both sides have, sorted; none where there is one group only."""
    found = set(drawn.groups) if real is None else set(real.groups) & set(drawn.groups)
    return sorted(found - {""}) if len(found - {""}) > 1 else []


def _rows(side: FeatureSet, group: str) -> FeatureSet:
    if not group:
        return side
    return side.rows(torch.tensor([i for i, one in enumerate(side.groups) if one == group]))


def _labels(side: FeatureSet | None) -> torch.Tensor | None:
    """Labels that fix how many pictures of each kind there are; None where nobody fixed them."""
    if side is None or bool((side.labels < 0).any()):
        return None
    return side.labels


def _protocol(
    about: dict[str, Any],
    sides: Sides,
    group: str,
    real: FeatureSet | None,
    drawn: FeatureSet,
) -> dict[str, Any]:
    stated = sides.drawn.protocol
    return about | {
        "data_set": sides.data_set,
        "reference": sides.real.fingerprint if real is not None else "",
        "real_pictures": dict(sides.real.protocol) if real is not None else {},
        "prompts": sides.prompts,
        "group": group,
        "drawn_pictures": {n: stated.get(n) for n in ("image_size", "fit", "channels")},
        "n_real": len(real) if real is not None else 0,
        "n_generated": len(drawn),
    }
