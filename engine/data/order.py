"""Which sample a position shows: seekable permutations of each pass; called by the loaders.

A position is an integer, pass p covers positions p * size to (p + 1) * size - 1, and each pass is a
permutation of the data. Any position is found without visiting those before it, so one integer
resumes a run for any world size.
"""

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from etude.core.errors import UserError
from etude.core.rng import Stream, bits, integers, permute

_WINDOWED = re.compile(r"windowed\(shards=([1-9][0-9]*)\)")


def window_of(kind: str) -> int | None:
    """Shards per window of an `order` option: None for "global", W for "windowed(shards=W)"."""
    if kind == "global":
        return None
    match = _WINDOWED.fullmatch(kind.replace(" ", ""))
    if match is None:
        raise UserError(
            f"order: {kind!r} is unknown; type order: global or order: windowed(shards=16)"
        )
    return int(match[1])


class Ordering(Protocol):
    """What a loader asks of an order."""

    def index(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices (B,) int64 of positions (B,) int64."""

    def size_at(self, positions: np.ndarray) -> np.ndarray:
        """From how many samples, the first ones, each position draws: (B,) int64."""


class StoredOrder:
    """Position i shows sample i mod size: no permutation, for references and evaluation."""

    def __init__(self, size: int) -> None:
        self.size = size

    def index(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices (B,) int64 of positions (B,) int64."""
        return np.asarray(positions, dtype=np.int64) % self.size

    def size_at(self, positions: np.ndarray) -> np.ndarray:
        """`size` for each position, (B,) int64."""
        return np.full(len(positions), self.size, dtype=np.int64)


class Order:
    """Permutations of `size` samples, one per pass.

    "global" permutes all samples. "windowed(shards=W)" permutes the shards, cuts them into windows
    of W, and permutes the samples inside each window, so that only W shards are read at a time (for
    network file systems); it needs `shard_sizes`, the number of samples of each shard.
    """

    def __init__(
        self, size: int, seed: int, kind: str = "global", *, shard_sizes: Sequence[int] = ()
    ) -> None:
        if size < 1:
            raise UserError("there are no samples to order; write some shards first")
        self.size, self.seed, self.window = size, seed, window_of(kind)
        self._counts = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        if self.window is not None and int(self._counts.sum()) != size:
            raise ValueError(f"shard_sizes add up to {int(self._counts.sum())}, not to {size}")
        self._tables: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def size_at(self, positions: np.ndarray) -> np.ndarray:
        """Number of samples that positions (B,) draw from, (B,) int64."""
        return np.full(len(positions), self.size, dtype=np.int64)

    def index(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices (B,) int64 in [0, size) for positions (B,) int64 of at least 0."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and positions.min() < 0:
            raise ValueError("positions start at 0")
        turns, places = positions // self.size, positions % self.size
        result = np.empty_like(places)
        for turn in np.unique(turns):
            chosen = turns == turn
            if self.window is None:
                result[chosen] = permute(
                    places[chosen], self.size, self.seed, Stream.ORDER, int(turn)
                )
            else:
                result[chosen] = self._windowed(places[chosen], int(turn))
        return result

    def _windowed(self, places: np.ndarray, turn: int) -> np.ndarray:
        shards, ends, windows = self._table(turn)
        window_of_place = np.searchsorted(windows, places, side="right")
        result = np.empty_like(places)
        for window in np.unique(window_of_place):
            chosen = window_of_place == window
            start = int(windows[window - 1]) if window else 0
            # Odd turns for windows, even ones for the shards' own permutation.
            number = 2 * (turn * len(windows) + int(window)) + 1
            inside = permute(
                places[chosen] - start,
                int(windows[window]) - start,
                self.seed,
                Stream.ORDER,
                number,
            )
            slot = np.searchsorted(ends, inside + start, side="right")
            shard = shards[slot]
            member = inside + start - (ends[slot] - self._counts[shard])
            result[chosen] = self._starts[shard] + member
        return result

    def _table(self, turn: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shards of a pass in order, where each ends, and where each window ends."""
        if turn not in self._tables:
            numbers = np.arange(len(self._counts), dtype=np.int64)
            shards = permute(numbers, len(numbers), self.seed, Stream.ORDER, 2 * turn)
            shards = shards[self._counts[shards] > 0]
            ends = np.cumsum(self._counts[shards])
            last = np.arange(self.window - 1, len(shards) + self.window - 1, self.window)
            last = np.minimum(last, len(shards) - 1)
            if len(self._tables) > 4:
                self._tables.clear()
            self._tables[turn] = (shards, ends, ends[last])
        return self._tables[turn]


class PoolOrder:
    """Draws from a pool that grows: sample = Philox(seed, POOL, position) mod size at position.

    `visible` holds (first position, size from there on) pairs in rising order. Adding a pair never
    changes what earlier positions draw. With `newest_weight` other than 1, each of the samples that
    became visible last is drawn that many times as often as each of the others.
    """

    def __init__(
        self,
        seed: int,
        visible: Sequence[tuple[int, int]] = (),
        *,
        newest_weight: float = 1.0,
    ) -> None:
        self.seed, self.newest_weight = seed, newest_weight
        self._positions = np.zeros(0, dtype=np.int64)
        self._sizes = np.zeros(0, dtype=np.int64)
        for position, size in visible:
            self.grow(position, size)

    def grow(self, position: int, size: int) -> None:
        """From `position` on, draws come from the first `size` samples."""
        if len(self._positions) and not (
            position >= self._positions[-1] and size >= self._sizes[-1]
        ):
            raise ValueError("a pool grows: positions and sizes must not fall")
        if len(self._positions) and position == self._positions[-1]:
            self._sizes[-1] = size
            return
        self._positions = np.append(self._positions, np.int64(position))
        self._sizes = np.append(self._sizes, np.int64(size))

    def size_at(self, positions: np.ndarray) -> np.ndarray:
        """Number of samples visible at positions (B,), (B,) int64; 0 before the first round."""
        return self._sizes_at(positions, 0)

    def index(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices (B,) int64 for positions (B,) int64."""
        sizes = self.size_at(positions)
        if len(sizes) and sizes.min() < 1:
            raise UserError(
                f"the pool is empty at position {int(np.asarray(positions)[sizes.argmin()])};"
                " add a round that is visible from there"
            )
        if self.newest_weight == 1.0:
            return integers(self.seed, Stream.POOL, positions, sizes).astype(np.int64)
        older = self._sizes_at(positions, 1)
        high, low = bits(self.seed, Stream.POOL, positions, 2).astype(np.uint64).T
        share = ((high << np.uint64(21)) | (low >> np.uint64(11))) * 2.0**-53
        place = share * (older + self.newest_weight * (sizes - older))
        newest = older + np.floor((place - older) / self.newest_weight).astype(np.int64)
        found = np.where(place < older, np.floor(place).astype(np.int64), newest)
        return np.minimum(found, sizes - 1)  # a product may round up to the end

    def _sizes_at(self, positions: np.ndarray, back: int) -> np.ndarray:
        """The size at each position, or `back` additions before."""
        place = np.searchsorted(self._positions, np.asarray(positions), side="right")
        sizes = np.concatenate([[0], self._sizes]).astype(np.int64)
        return sizes[np.maximum(place - back, 0)]
