"""Set x extractors -> store: each picture decoded once, one forward per extractor and picture.

Called by plan.py, planned/ and the command line; usable alone with a set, a list of extractors and
a `FeatureStore`. Shards that a stopped job left are kept and only missing ones are made; several
processes take turns at the missing ones, so no picture is padded in or counted twice, and the
store counts them in the end. Another job may fill the same entries meanwhile: a shard that it has
written is left out. A network sees blocks of one fixed size, the last one padded, because
the rounding of a matrix product depends on its batch. While a block is in the network the next one
is being read.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from etude.core.distributed import FOREVER_S, World, exchange
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.signals import StopRequested
from etude.metrics.extractors import Extractor, preprocessing
from etude.metrics.store import EntryWriter, FeatureKey, FeatureStore, check_keys

from .sets import GeneratedPictures, Pictures, PictureSet, Stages


def feature_key(pictures: PictureSet, extractor: Extractor, features: str = "") -> FeatureKey:
    """The address of a set's features; of the extractor's first tap where no name is given."""
    return FeatureKey(
        pictures.fingerprint,
        features or extractor.name,
        extractor.version,
        extractor.weights_sha256,
        preprocessing(extractor),
        extractor.arithmetic,
        len(pictures),
    )


@dataclass(frozen=True)
class _Entry:
    """An entry of the store that lacks shards: whose, under which name, where it is written, and
    which ranges of pictures it lacked when the first process looked.
    """

    extractor: Extractor
    features: str
    writer: EntryWriter
    missing: set[tuple[int, int]]

    def lacks(self, start: int, stop: int) -> bool:
        """Whether a shard is still to be made; another job may have written it by now."""
        return (start, stop) in self.missing and not self.writer.has(start, stop)


def extract_set(
    pictures: PictureSet,
    extractors: Sequence[Extractor],
    store: FeatureStore,
    *,
    batch_size: int = 64,
    shard_size: int = 1024,
    log: Log | None = None,
    world: World | None = None,
) -> dict[str, float]:
    """Fill the store with the features of a set by every extractor and tap that lacks them.

    Args:
        batch_size: pictures per forward; all blocks have exactly this size.
        shard_size: pictures per file of the store.
        world: processes that share the work, all of which call this; None: this one alone.

    Returns:
        Images per second by stage ("read", "decode", "draw", "resize", "forward", "statistics")
        and "all" of them together, over all processes; empty when nothing was missing.

    Raises:
        StopRequested: one of the processes was asked to stop; whole shards are kept.
        UserError: on every process, what was wrong on one. A sample key that is there twice is; of
            a set that knows its `keys`, before it is read.
    """
    check_keys(getattr(pictures, "keys", ()))
    log = log or Log(None, quiet=True)
    rank, size = (world.rank, world.size) if world else (0, 1)
    entries = _entries(pictures, extractors, store, shard_size, world)
    ranges = sorted(set().union(*(entry.missing for entry in entries)))
    mine = ranges[rank::size]
    stages, began, count = Stages(), time.perf_counter(), 0
    trouble: StopRequested | UserError | None = None
    total, names = sum(stop - start for start, stop in mine), ", ".join(e.features for e in entries)
    try:
        with log.progress(f"features of {pictures.name} ({names})", total) as progress:
            for start, stop in mine:
                lacking = [entry for entry in entries if entry.lacks(start, stop)]
                if not lacking:
                    progress.advance(stop - start)
                    continue
                for done in _shard(pictures, lacking, start, stop, batch_size, stages):
                    count += done
                    progress.advance(done)
    except (StopRequested, UserError) as error:
        trouble = error
    seconds = stages.seconds | {"all": time.perf_counter() - began}
    ended(world, "every shard of the features", trouble, log)
    if rank == 0:
        try:
            for entry in entries:
                entry.writer.finish()
        except UserError as error:
            trouble = error
    ended(world, "features are counted", trouble, log)
    if world is not None:
        told = exchange(world, "rates of the features", {"count": count, "seconds": seconds})
        return _rates([(one["count"], one["seconds"]) for one in told])
    return _rates([(count, seconds)])


def device_for(asked: str, world: World | None) -> torch.device:
    """The device of this process, where a recipe asks for "auto" or for a kind of device."""
    if world is not None and asked in ("auto", world.device.type):
        return world.device
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(asked)


def ended(
    world: World | None, what: str, trouble: StopRequested | UserError | None, log: Log
) -> None:
    """Wait until every process has done its part, or leave with all of them: a process that left
    alone would keep the others waiting.

    Args:
        trouble: why this process left out some of its part.

    Raises:
        UserError: one of the processes had one.
        StopRequested: one of them was asked to stop.
    """
    if world is None or world.size == 1:
        if trouble is not None:
            raise trouble
        return

    def asked() -> str | None:  # a process that was killed never comes
        try:
            if log.on_advance is not None:
                log.on_advance()
        except StopRequested as reason:
            return str(reason)
        return None

    wrong = str(trouble) if isinstance(trouble, UserError) else ""
    told = exchange(world, what, [trouble is not None, wrong], FOREVER_S, stopped=asked)
    for _, said in told:
        if said:
            raise UserError(said)
    if any(left for left, _ in told):
        raise trouble or StopRequested("another process was asked to stop")


def _entries(
    pictures: PictureSet,
    extractors: Sequence[Extractor],
    store: FeatureStore,
    shard_size: int,
    world: World | None,
) -> list[_Entry]:
    """The entries that are not complete, with what they lack.

    The first process looks for all: each by itself might see a store that another job fills
    differently, and they would leave shards out between them.
    """
    found: list = []
    if world is None or world.rank == 0:
        found = [
            [number, name, store.writer(key, shard_size).missing()]
            for number, extractor in enumerate(extractors)
            for name in extractor.dims
            if not store.has(key := feature_key(pictures, extractor, name))
        ]
    if world is not None:
        found = exchange(world, "features that are missing", found, FOREVER_S)[0]
    return [
        _Entry(
            extractors[number],
            name,
            store.writer(feature_key(pictures, extractors[number], name), shard_size),
            {(start, stop) for start, stop in missing},
        )
        for number, name, missing in found
    ]


def _rates(parts: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Images per second by stage: what every process did in its own time, added up."""
    total: dict[str, float] = {}
    for count, seconds in parts:
        for stage, spent in seconds.items():
            if count and spent:
                total[stage] = total.get(stage, 0.0) + count / spent
    return {stage: round(rate, 2) for stage, rate in total.items()}


def _shard(
    pictures: PictureSet,
    entries: Sequence[_Entry],
    start: int,
    stop: int,
    batch_size: int,
    stages: Stages,
) -> Iterator[int]:
    """Read one shard's pictures and write their features; yields pictures done as they are."""
    found: dict[tuple[int, str], list[torch.Tensor]] = {
        (id(entry.extractor), entry.features): [] for entry in entries
    }
    extractors = list({id(e.extractor): e.extractor for e in entries}.values())
    keys, groups, labels = [], [], []
    for block in _ahead(pictures, start, stop, batch_size, stages):
        for extractor in extractors:
            for name, features in _forward(extractor, block.images, batch_size, stages).items():
                if (id(extractor), name) in found:
                    found[id(extractor), name].append(features)
        keys += block.keys
        groups += block.groups
        labels.append(block.labels)
        yield len(block.keys)
    of_all = torch.from_numpy(np.concatenate(labels))
    with stages("statistics"):
        for entry in entries:
            features = torch.cat(found[id(entry.extractor), entry.features])
            entry.writer.write(start, features, keys, of_all, groups)


def _ahead(
    pictures: PictureSet, start: int, stop: int, batch_size: int, stages: Stages
) -> Iterator[Pictures]:
    """Blocks of a shard, each read in a thread of its own while its caller has the one before.

    Drawing is not reading: it has the device for itself.
    """
    if isinstance(pictures, GeneratedPictures):
        for first in range(start, stop, batch_size):
            yield pictures.read(first, min(first + batch_size, stop), stages)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        coming: Any = None
        for first in range(start, stop, batch_size):
            last = min(first + batch_size, stop)
            following = pool.submit(pictures.read, first, last, stages)
            if coming is not None:
                yield coming.result()
            coming = following
        yield coming.result()


def _forward(
    extractor: Extractor, images: np.ndarray | Sequence[np.ndarray], size: int, stages: Stages
) -> dict[str, torch.Tensor]:
    """Features of a block on the CPU, by name; the first picture pads the block to `size`."""
    count = len(images)
    with stages("resize"):
        prepared = extractor.prepare(images)
        if count < size:
            padding = prepared[:1].expand(size - count, *prepared.shape[1:])
            prepared = torch.cat([prepared, padding])
        _finish(prepared)
    with stages("forward"):
        found = extractor.infer(prepared)
        return {name: features[:count].cpu() for name, features in found.items()}


def _finish(x: torch.Tensor) -> None:
    """Wait for the device, so that a stage's time is its own; once a block."""
    if x.is_cuda:
        torch.cuda.current_stream(x.device).synchronize()
