"""A growing pool of generated pictures; called by practice, which adds to it and learns from it.

A pool is a folder that is only ever added to. Any process may write parts into it
(`pool_parts.py`); one process publishes them: a picture exists once the line of its part stands in
`manifest.jsonl`.
"""

import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from etude.core.errors import UserError
from etude.core.files import read_json

from .decode_torch import decode_picture
from .order import PoolOrder
from .picture import BadPicture
from .pool_parts import (
    COLUMNS,
    Part,
    PartKey,
    read_columns,
    read_manifest,
    write_manifest,
    write_part,
)
from .shards import ShardSet

_DECODERS = min(8, os.cpu_count() or 1)
_OPEN_PARTS = 64  # each holds two files or more, of the usual limit of 1,024


class Pool:
    """Pictures by index 0 to len - 1, in the order in which they were published.

    Attributes:
        parts: the published parts.
        image_size, channels: of every picture; 0 while the pool is empty.
    """

    def __init__(self, folder: str | Path, *, cache_bytes: int = 1 << 30) -> None:
        """Opens a pool, or starts one in an absent or empty folder.

        Args:
            cache_bytes: decoded pictures are kept in memory while the pool is smaller than this.

        Raises:
            UserError: the manifest or a published part is damaged.
        """
        self.folder = Path(folder)
        self._cache_bytes = cache_bytes
        self._decoders: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._forget()
        self.refresh()

    def __len__(self) -> int:
        return self.parts[-1].first + self.parts[-1].count if self.parts else 0

    def refresh(self) -> None:
        """Follow what another process has published or withdrawn since."""
        found = read_manifest(self.folder)
        if found[: len(self.parts)] != self.parts:
            self._forget()
        for entry in found[len(self.parts) :]:
            self._admit(entry)

    def publish(self, keys: Sequence[PartKey], *, round_number: int, visible_from: int) -> None:
        """Make written parts count, all of them at once.

        Args:
            keys: of parts whose folders are in the pool, in the order of their indices.
            round_number: the addition that they belong to, not below the last part's.
            visible_from: position of the learner's stream, not below the last part's.
        """
        last = self.parts[-1] if self.parts else None
        if last is not None and (visible_from < last.visible_from or round_number < last.round):
            raise ValueError(
                f"round {round_number}, visible from {visible_from}, comes before the one it"
                " follows"
            )
        entries: list[Part] = []
        for key in keys:
            first = entries[-1].first + entries[-1].count if entries else len(self)
            if key.first != first:
                raise ValueError(f"part {key.folder} does not begin at {first}")
            fingerprint = ShardSet(self.folder / key.folder).fingerprint
            entry = Part(
                part=len(self.parts) + len(entries),
                round=round_number,
                first=first,
                count=key.count,
                visible_from=int(visible_from),
                seed=key.seed,
                guidance=key.guidance,
                generator=key.generator,
                learner=key.learner,
                folder=key.folder,
                fingerprint=fingerprint,
            )
            entries.append(entry)
        write_manifest(self.folder, [*self.parts, *entries])
        for entry in entries:
            self._admit(entry)

    def append(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        *,
        seed_indices: Sequence[int] | np.ndarray,
        entropies: Sequence[float] | np.ndarray,
        visible_from: int,
        guidance: Any = None,
        generator: str = "",
        learner: str = "",
        seed: int = 0,
        per_shard: int = 1000,
    ) -> Part:
        """Write pictures and publish them as a round of their own, for who draws by other means.

        Args: as `write_part` and `publish`.
        """
        if self.parts and images.shape[2:] != (self.image_size, self.channels):
            raise ValueError(f"the pool holds {self.channels} x {self.image_size} pictures")
        content = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
        key = PartKey(len(self), len(images), seed, guidance, generator, learner, content)
        write_part(
            self.folder,
            key,
            images,
            labels,
            seed_indices=seed_indices,
            entropies=entropies,
            per_shard=per_shard,
        )
        number = self.parts[-1].round + 1 if self.parts else 0
        self.publish([key], round_number=number, visible_from=visible_from)
        return self.parts[-1]

    def rewind(self, position: int) -> int:
        """Withdraws the parts that become visible after `position`; returns how many.

        A run that resumes from position P publishes its later rounds again, as it did before.
        """
        kept = [entry for entry in self.parts if entry.visible_from <= position]
        dropped = len(self.parts) - len(kept)
        if dropped:
            write_manifest(self.folder, kept)
            self.refresh()
        return dropped

    @property
    def ends(self) -> list[int]:
        """Size of the pool after each round that has begun."""
        ends: dict[int, int] = {}
        for entry in self.parts:
            ends[entry.round] = entry.first + entry.count
        return [ends[number] for number in sorted(ends)]

    def rounds_of(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The round that each picture came with, (B,) int64."""
        numbers = np.array([entry.round for entry in self.parts], dtype=np.int64)
        return numbers[self._locate(np.asarray(indices, dtype=np.int64))[0]]

    def size_at(self, position: int) -> int:
        """Number of pictures that position draws from."""
        return int(self.order(0).size_at(np.array([position]))[0])

    def order(self, seed: int) -> PoolOrder:
        """Draws from the parts published so far; `PoolOrder.grow` follows later ones."""
        ends = [(entry.visible_from, entry.first + entry.count) for entry in self.parts]
        return PoolOrder(seed, ends)

    def cost(self, size: int | None = None) -> dict[str, float]:
        """What drawing the first `size` pictures took, by name, summed over their parts."""
        total: dict[str, float] = {}
        for entry, cost in zip(self.parts, self._costs, strict=True):
            if size is None or entry.first + entry.count <= size:
                for name, value in cost.items():
                    total[name] = total.get(name, 0.0) + value
        return total

    def costs(self, round_number: int) -> list[dict[str, float]]:
        """What drawing each part of a round took."""
        pairs = zip(self.parts, self._costs, strict=True)
        return [cost for entry, cost in pairs if entry.round == round_number]

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Pictures (B, S, S, C) uint8 by pool index (B,)."""
        indices = np.asarray(indices, dtype=np.int64)
        size, channels = self.image_size, self.channels
        result = np.zeros((len(indices), size, size, channels), dtype=np.uint8)
        place, inside = self._locate(indices)
        if len(self) * channels * size * size <= self._cache_bytes:
            for number in np.unique(place):
                if number not in self._decoded:
                    every = [(number, i) for i in range(self.parts[number].count)]
                    self._decoded[number] = np.stack(self._decode_all(every))
                rows = np.flatnonzero(place == number)
                result[rows] = self._decoded[number][inside[rows]]
        elif len(indices):
            self._decoded.clear()
            result[:] = self._decode_all(list(zip(place, inside, strict=True)))
        return result

    def labels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Asked-for classes (B,) int64."""
        return self._column("label", indices)

    def seed_indices(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Positions whose noise the pictures were drawn from, (B,) int64."""
        return self._column("seed_index", indices)

    def entropies(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Entropies when drawn, (B,) float32 nats, nan where none was taken."""
        return self._column("entropy", indices)

    def digests(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """sha256 of the pixels (B, 32) uint8."""
        return self._column("digest", indices)

    def _forget(self) -> None:
        self.parts: list[Part] = []
        self.image_size = self.channels = 0
        self._shards: OrderedDict[int, ShardSet] = OrderedDict()
        self._costs: list[dict[str, float]] = []
        self._decoded: dict[int, np.ndarray] = {}
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}

    def _column(self, name: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, dtype=np.int64)
        self._locate(indices)
        columns = self._columns[name]
        if len(columns) > 1:
            columns[:] = [np.concatenate(columns)]
        return columns[0][indices]

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(indices) and not (0 <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"pool index outside 0 to {len(self) - 1}")
        firsts = np.array([entry.first for entry in self.parts], dtype=np.int64)
        place = np.searchsorted(firsts, indices, side="right") - 1
        return place, indices - firsts[place] if len(indices) else indices

    def _decode_all(self, places: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        if len(places) < 2 * _DECODERS:
            return [self._decode(*place) for place in places]
        if self._decoders is None:
            self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="pool")
        return list(self._decoders.map(lambda place: self._decode(*place), places))

    def _decode(self, number: int, member: int) -> np.ndarray:
        try:
            sample = self._shards_of(int(number))[int(member)]
            picture = decode_picture(sample.data, self.channels)
        except BadPicture as error:
            raise UserError(
                f"{self.folder / self.parts[number].folder}: picture {member} is damaged"
                f" ({error}); restore the pool or go back to an earlier checkpoint"
            ) from None
        size = self.image_size
        return np.asarray(picture).reshape(size, size, self.channels)

    def _shards_of(self, number: int) -> ShardSet:
        """The shards of a part; those of a few parts are kept open."""
        with self._lock:
            if number not in self._shards:
                self._shards[number] = ShardSet(self.folder / self.parts[number].folder)
                if len(self._shards) > _OPEN_PARTS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(number)
            return self._shards[number]

    def _admit(self, entry: Part) -> None:
        place = self.folder / entry.folder
        shards = ShardSet(place)
        if len(shards) != entry.count or shards.fingerprint != entry.fingerprint:
            raise UserError(f"{place} is not the part the manifest lists; restore the pool")
        columns = read_columns(place, entry.count)
        if not np.array_equal(columns["label"], shards.labels):
            raise UserError(f"{place / 'columns.npz'} has other labels than the shards")
        if not self.parts:
            first = decode_picture(shards[0].data, 3)
            self.image_size = first.height
            self.channels = 1 if Image.open(io.BytesIO(shards[0].data)).mode == "L" else 3
        self._costs.append(read_json(place / "cost.json"))
        self.parts.append(entry)
        for name, values in columns.items():
            self._columns[name].append(values)
