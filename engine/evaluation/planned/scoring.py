"""Scores of drawn pictures by their prompts: kept in the store picture by picture, then figures.

Called by running.py. A scorer (metrics/alignment/) looks at each picture once, whoever asks and
however often: its scores are an entry of the feature store, a column a figure, resumable by shard
and shared between processes like features.
"""

import json
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from etude.core.distributed import FOREVER_S, World, exchange
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.signals import StopRequested
from etude.metrics.alignment import Asked, Scorer
from etude.metrics.store import FeatureKey, FeatureSet, FeatureStore

from ..extract import ended
from ..picture_set import Pictures, PictureSet, Stages


class AskedPictures(PictureSet, Protocol):
    """Pictures that know what each was drawn of."""

    def asked(self, start: int, stop: int) -> list[Asked]:
        """The prompts of pictures start to stop."""
        ...


def stated(scorer: Scorer, features: dict[str, Any] | None) -> dict[str, Any]:
    """What fixes a scorer's numbers; neither where its weights lie nor how fast it goes is of it.

    Args:
        features: what fixes the features that it takes, if it takes some.
    """
    changing = {
        name
        for name, field in type(scorer.options).model_fields.items()
        if name != "weights" and (field.json_schema_extra or {}).get("affects_result", True)
    }
    about = {
        "metric": scorer.name,
        "options": scorer.options.model_dump(mode="json", include=changing),
        "version": scorer.version,
        "weights_sha256": scorer.weights_sha256,
    }
    return about | ({} if features is None else {"features": features})


def scores_key(pictures: PictureSet, about: dict[str, Any]) -> FeatureKey:
    """The address of the scores of a set by a scorer of which `stated` said `about`."""
    return FeatureKey(
        pictures.fingerprint,
        f"scores of {about['metric']}",
        about["version"],
        about["weights_sha256"],
        json.dumps([about["options"], about.get("features")], sort_keys=True),
        "float32",
        len(pictures),
    )


def score_set(
    pictures: AskedPictures,
    scorer: Scorer,
    key: FeatureKey,
    store: FeatureStore,
    features: FeatureSet | None,
    *,
    batch_size: int = 64,
    shard_size: int = 256,
    log: Log,
    world: World | None = None,
) -> None:
    """Fill the store with a scorer's scores of a set, as far as they are missing.

    Args:
        key: where they are kept.
        features: of the kind that the scorer needs; None for one that looks at pictures.
        world: processes that share the work, all of which call this.

    Raises:
        StopRequested: one of the processes was asked to stop; whole shards are kept.
        UserError: on every process, what was wrong on one.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    ranges, writer = [], store.writer(key, shard_size)
    trouble: StopRequested | UserError | None = None
    if rank == 0 and not store.has(key):
        ranges = writer.missing()
    if world is not None:  # as the first process sees it, which another job may change meanwhile
        ranges = exchange(world, "scores that are missing", ranges, FOREVER_S)[0]
    mine = ranges[rank::size]
    total = sum(stop - start for start, stop in mine)
    try:
        with log.progress(f"{scorer.name} of {pictures.name}", total) as progress:
            for start, stop in mine:
                if writer.has(start, stop):
                    progress.advance(stop - start)
                    continue
                blocks = _scores(pictures, scorer, features, start, stop, batch_size)
                found, keys, labels, groups = [], [], [], []
                for scores, block in blocks:
                    found.append(scores)
                    keys += block.keys
                    labels.append(torch.as_tensor(block.labels))
                    groups += block.groups
                    progress.advance(len(scores))
                writer.write(start, torch.cat(found), keys, torch.cat(labels), groups)
    except (StopRequested, UserError) as error:
        trouble = error
    ended(world, "every shard of the scores", trouble, log)
    if rank == 0 and not store.has(key):
        try:
            writer.finish()
        except UserError as error:
            trouble = error
    ended(world, "scores are counted", trouble, log)


def _scores(
    pictures: AskedPictures,
    scorer: Scorer,
    features: FeatureSet | None,
    start: int,
    stop: int,
    batch_size: int,
) -> Iterator[tuple[torch.Tensor, Pictures | FeatureSet]]:
    """Scores (B, figures) and what was scored, block after block of a shard."""
    for first in range(start, stop, batch_size):
        last = min(first + batch_size, stop)
        if features is None:
            block = pictures.read(first, last, Stages())
            given = block.images
        else:  # which know their pictures' keys: nothing is read again
            block = features.rows(torch.arange(first, last))
            given = block.features
        scores = scorer.score(given, pictures.asked(first, last))
        yield torch.stack([scores[name] for name in scorer.figures], dim=1), block
