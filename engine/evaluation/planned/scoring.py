"""Scores of drawn pictures by their prompts: kept in the store picture by picture, then figures.

Called by running.py. A scorer (metrics/alignment/) looks at each picture once, whoever asks and
however often: its scores are an entry of the feature store, a column a figure, resumable by shard
and shared between processes like features.
"""

import json
from typing import Protocol

import torch

from etude.core.distributed import FOREVER_S, World, barrier
from etude.core.log import Log
from etude.metrics.alignment import Asked, Scorer
from etude.metrics.store import FeatureKey, FeatureStore

from ..picture_set import Pictures, PictureSet, Stages


class AskedPictures(PictureSet, Protocol):
    """Pictures that know what each was drawn of."""

    def asked(self, start: int, stop: int) -> list[Asked]:
        """The prompts of pictures start to stop."""
        ...


def scores_key(pictures: PictureSet, scorer: Scorer) -> FeatureKey:
    """The address of a scorer's scores of a set."""
    options = json.dumps(scorer.options.model_dump(mode="json"), sort_keys=True)
    return FeatureKey(
        pictures.fingerprint,
        f"scores of {scorer.name}",
        scorer.version,
        scorer.weights_sha256,
        options,
        "float32",
        len(pictures),
    )


def score_set(
    pictures: AskedPictures,
    scorer: Scorer,
    store: FeatureStore,
    features: torch.Tensor | None,
    *,
    batch_size: int = 64,
    shard_size: int = 256,
    log: Log,
    world: World | None = None,
) -> None:
    """Fill the store with a scorer's scores of a set, as far as they are missing.

    Args:
        features: (N, D) of the kind that the scorer needs; None for one that looks at pictures.
        world: processes that share the work, all of which call this.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    key = scores_key(pictures, scorer)
    ranges, writer = [], store.writer(key, shard_size)
    if not store.has(key):
        ranges = writer.missing()
    if world is not None:  # nobody writes before everybody has looked
        barrier(world, "scores that are missing")
    mine = ranges[rank::size]
    total = sum(stop - start for start, stop in mine)
    with log.progress(f"{scorer.name} of {pictures.name}", total) as progress:
        for start, stop in mine:
            found: list[torch.Tensor] = []
            notes: list[Pictures] = []
            for first in range(start, stop, batch_size):
                last = min(first + batch_size, stop)
                block = pictures.read(first, last, Stages())
                given = block.images if features is None else features[first:last]
                scores = scorer.score(given, pictures.asked(first, last))
                found.append(torch.stack([scores[name] for name in scorer.figures], dim=1))
                notes.append(block)
                progress.advance(last - first)
            keys = [key for block in notes for key in block.keys]
            groups = [group for block in notes for group in block.groups]
            labels = torch.cat([torch.from_numpy(block.labels) for block in notes])
            writer.write(start, torch.cat(found), keys, labels, groups)
    if world is not None:
        barrier(world, "every shard of the scores", FOREVER_S)
    if rank == 0 and not store.has(key):
        writer.finish()
    if world is not None:
        barrier(world, "scores are counted")
