"""Set x extractors -> store: each picture decoded or drawn once, one forward per extractor.

Called by plan.py; usable alone with a set, a list of extractors and a `FeatureStore`. Shards that a
stopped job left are kept and only missing ones are made. A network sees blocks of one fixed size,
the last one padded, because the rounding of a matrix product depends on its batch.
"""

from collections.abc import Iterator

import numpy as np
import torch

from etude.core.log import Log
from etude.metrics.extractors import Extractor, preprocessing
from etude.metrics.store import EntryWriter, FeatureKey, FeatureStore

from .sets import Pictures, PictureSet, Stages


def feature_key(pictures: PictureSet, extractor: Extractor) -> FeatureKey:
    """The address of a set's features."""
    return FeatureKey(
        pictures.fingerprint,
        extractor.name,
        extractor.version,
        extractor.weights_sha256,
        preprocessing(extractor),
        "float32",
        len(pictures),
    )


def extract_set(
    pictures: PictureSet,
    extractors: list[Extractor],
    store: FeatureStore,
    *,
    batch_size: int = 64,
    shard_size: int = 1024,
    device: torch.device | str = "cpu",
    log: Log | None = None,
) -> dict[str, float]:
    """Fill the store with the features of a set by every extractor that lacks them.

    Args:
        batch_size: pictures per forward; all blocks have exactly this size.
        shard_size: pictures per file of the store.

    Returns:
        Images per second by stage ("read", "decode", "draw", "forward", "store"); empty when
        nothing was missing.
    """
    log = log or Log(None, quiet=True)
    writers = {}
    for extractor in extractors:
        key = feature_key(pictures, extractor)
        if not store.has(key):
            writers[key.digest()] = (extractor, store.writer(key, shard_size))
    missing = {digest: set(writer.missing()) for digest, (_, writer) in writers.items()}
    ranges = sorted(set().union(*missing.values()))
    count, stages = sum(stop - start for start, stop in ranges), Stages()
    names = ", ".join(extractor.name for extractor, _ in writers.values())
    with log.progress(f"features of {pictures.name} ({names})", count) as progress:
        for start, stop in ranges:
            wanted = [writers[digest] for digest in writers if (start, stop) in missing[digest]]
            for done in _shard(pictures, wanted, start, stop, batch_size, device, stages):
                progress.advance(done)
    for _, writer in writers.values():
        writer.finish()
    return {stage: round(count / seconds, 2) for stage, seconds in stages.seconds.items() if count}


def _shard(
    pictures: PictureSet,
    wanted: list[tuple[Extractor, EntryWriter]],
    start: int,
    stop: int,
    batch_size: int,
    device: torch.device | str,
    stages: Stages,
) -> Iterator[int]:
    """Read one shard's pictures and write their features; yields pictures done as they are."""
    features: list[list[torch.Tensor]] = [[] for _ in wanted]
    blocks: list[Pictures] = []
    for first in range(start, stop, batch_size):
        block = pictures.read(first, min(first + batch_size, stop), stages)
        with stages("forward"):
            images = torch.from_numpy(_padded(block.images, batch_size)).to(device)
            for into, (extractor, _) in zip(features, wanted, strict=True):
                into.append(extractor(images)[: len(block.keys)].cpu())
        blocks.append(block)
        yield len(block.keys)
    keys = [key for block in blocks for key in block.keys]
    groups = [group for block in blocks for group in block.groups]
    labels = torch.from_numpy(np.concatenate([block.labels for block in blocks]))
    with stages("store"):
        for into, (_, writer) in zip(features, wanted, strict=True):
            writer.write(start, torch.cat(into), keys, labels, groups)


def _padded(images: np.ndarray, size: int) -> np.ndarray:
    """The pictures with the first one repeated up to `size`."""
    if len(images) == size:
        return np.ascontiguousarray(images)
    return np.concatenate([images, np.repeat(images[:1], size - len(images), axis=0)])
