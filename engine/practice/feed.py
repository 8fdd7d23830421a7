"""Which pictures a position of the learner's stream shows; called by course.py.

The stream is one integer: step s covers positions s * batch to (s + 1) * batch - 1, whatever the
number of processes, and what a position shows is a function of it, the seed and the manifest.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from etude.core.rng import Stream, uniform
from etude.data.order import PoolOrder
from etude.data.pool import Pool

from .pictures import Pictures

Batch = tuple[np.ndarray, np.ndarray]
Fetch = Callable[[np.ndarray], Batch]


def real_feed(pictures: Pictures, seed: int) -> Fetch:
    """Any of the pictures at any position."""
    order = PoolOrder(seed, [(0, len(pictures))])

    def fetch(positions: np.ndarray) -> Batch:
        rows = order.index(positions)
        return pictures.images(rows), pictures.labels(rows)

    return fetch


def pool_feed(
    pool: Pool, seed: int, newest_weight: float = 1.0, last_round: int | None = None
) -> Fetch:
    """Those of the pool that are visible at a position; with `last_round` as if it were the last.

    Args:
        newest_weight: see `PoolOrder`.
    """

    order, seen = PoolOrder(seed, newest_weight=newest_weight), 0

    def fetch(positions: np.ndarray) -> Batch:
        nonlocal seen
        for entry in pool.parts[seen:]:
            if last_round is None or entry.round <= last_round:
                order.grow(entry.visible_from, entry.first + entry.count)
        seen = len(pool.parts)
        rows = order.index(positions)
        return pool.images(rows), pool.labels(rows)

    return fetch


def mixed_feed(real: Fetch, drawn: Fetch, real_share: float, seed: int) -> Fetch:
    """At each position a real picture with probability `real_share`, else a drawn one."""

    def fetch(positions: np.ndarray) -> Batch:
        positions = np.asarray(positions, np.int64)
        is_real = uniform(seed, Stream.REAL_OR_DRAWN, positions)[:, 0] < real_share
        kinds = ((is_real, real), (~is_real, drawn))
        parts = [(rows, feed(positions[rows])) for rows, feed in kinds if rows.any()]
        first = parts[0][1]
        images = np.empty((len(positions), *first[0].shape[1:]), np.uint8)
        labels = np.empty(len(positions), np.int64)
        for rows, (some, classes) in parts:
            images[rows], labels[rows] = some, classes
        return images, labels

    return fetch


class Ahead:
    """A feed that reads the next step's pictures while this step's are learned from.

    Args:
        batch: positions of a step.
    """

    def __init__(self, fetch: Fetch, batch: int) -> None:
        self._fetch, self._batch = fetch, batch
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._next: tuple[bytes, Future[Batch]] | None = None

    def __call__(self, positions: np.ndarray) -> Batch:
        """See `Fetch`; asks for the same places of the next step at once."""
        positions = np.asarray(positions, np.int64)
        waiting, self._next = self._next, None
        if waiting is not None and waiting[0] == positions.tobytes():
            found = waiting[1].result()
        else:
            found = self._fetch(positions)
        later = positions + self._batch
        self._next = later.tobytes(), self._reader.submit(self._fetch, later)
        return found

    def forget(self) -> None:
        """The pool has changed: what was read ahead may be something else now."""
        if self._next is not None:
            self._next[1].cancel()
            if not self._next[1].cancelled():
                self._next[1].exception()
        self._next = None

    def close(self) -> None:
        """End the reading thread."""
        self.forget()
        self._reader.shutdown()
