"""A growing pool of generated pictures; called by the practice rounds, which add to it, and by the
learner's training, which draws from it.

A pool is a folder that is only ever added to: each round is a folder of WebDataset shards, and
`manifest.jsonl` has one line per round. A round exists once its line does: the folder is renamed
into place first, then the manifest is replaced. What a crash leaves in between is ignored, and
overwritten by the next round.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from etude.core.errors import UserError
from etude.core.files import write_bytes_atomic

from .decode_torch import decode_picture
from .order import PoolOrder
from .picture import BadPicture
from .shards import ShardSet, write_shards

_MANIFEST = "manifest.jsonl"
_COLUMNS = ("label", "seed_index", "entropy")


@dataclass(frozen=True)
class Round:
    """One addition, as its manifest line says.

    Attributes:
        round: number from 0.
        first, count: its pictures are pool indices first to first + count - 1.
        visible_from: position of the learner's stream from which they are drawn.
        guidance: free text or numbers describing how they were guided.
        generator, learner: identity of the weights that drew and that guided.
        folder: name of the round's folder inside the pool.
        fingerprint: sha256 of the round's shards.
    """

    round: int
    first: int
    count: int
    visible_from: int
    guidance: Any
    generator: str
    learner: str
    folder: str
    fingerprint: str


class Pool:
    """Pictures by index 0 to len - 1, in the order in which they were added.

    Attributes:
        rounds: the published rounds.
        image_size, channels: of every picture; 0 while the pool is empty.
    """

    def __init__(self, folder: str | Path, *, cache_bytes: int = 1 << 30) -> None:
        """Opens a pool, or starts one in an absent or empty folder.

        Args:
            cache_bytes: decoded pictures are kept in memory while the pool is smaller than this.

        Raises:
            UserError: the manifest or a published round is damaged.
        """
        self.folder = Path(folder)
        self._cache_bytes = cache_bytes
        self.rounds: list[Round] = []
        self.image_size = self.channels = 0
        self._shards: list[ShardSet] = []
        self._decoded: dict[int, np.ndarray] = {}
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
        for number, line in enumerate(self._lines()):
            self._admit(self._parse(number, line))

    def __len__(self) -> int:
        return self.rounds[-1].first + self.rounds[-1].count if self.rounds else 0

    def append(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        *,
        seed_indices: Sequence[int] | np.ndarray,
        entropies: Sequence[float] | np.ndarray,
        visible_from: int,
        guidance: Any,
        generator: str,
        learner: str,
        per_shard: int = 1000,
    ) -> Round:
        """Publishes one round; either all of it exists afterwards or none.

        Args:
            images: (N, S, S, C) uint8, C 1 or 3.
            labels: N class numbers the pictures were asked for.
            seed_indices: N positions whose noise they were drawn from.
            entropies: N entropies of the learner's prediction, in nats; nan where none was taken.
            visible_from: position of the learner's stream, not below the last round's.
            guidance: how they were guided, JSON-serialisable.
        """
        self._check(images, labels, seed_indices, entropies, visible_from)
        number = len(self.rounds)
        place = self.folder / f"round-{number:05d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if place.exists():
            shutil.rmtree(place)
        columns = {
            "label": np.asarray(labels, dtype=np.int64),
            "seed_index": np.asarray(seed_indices, dtype=np.int64),
            "entropy": np.asarray(entropies, dtype=np.float32),
        }
        write_shards(place, _samples(number, images, columns), per_shard=per_shard)
        with io.BytesIO() as buffer:
            np.savez(buffer, **columns)
            write_bytes_atomic(place / "columns.npz", buffer.getvalue())
        entry = Round(
            round=number,
            first=len(self),
            count=len(images),
            visible_from=int(visible_from),
            guidance=guidance,
            generator=generator,
            learner=learner,
            folder=place.name,
            fingerprint=ShardSet(place).fingerprint,
        )
        self._write([*self.rounds, entry])
        self._admit(entry)
        return self.rounds[-1]

    def rewind(self, position: int) -> int:
        """Withdraws the rounds that become visible after `position`; returns how many.

        A run that resumes from position P makes its later rounds again, equal to the first time.
        """
        kept = [entry for entry in self.rounds if entry.visible_from <= position]
        dropped = len(self.rounds) - len(kept)
        if dropped:
            self._write(kept)
            self.__init__(self.folder, cache_bytes=self._cache_bytes)
        return dropped

    def size_at(self, position: int) -> int:
        """Number of pictures that position draws from."""
        return int(self.order(0).size_at(np.array([position]))[0])

    def order(self, seed: int) -> PoolOrder:
        """Draws from the rounds published so far; `PoolOrder.grow` follows later ones."""
        ends = [(entry.visible_from, entry.first + entry.count) for entry in self.rounds]
        return PoolOrder(seed, ends)

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Pictures (B, S, S, C) uint8 by pool index (B,)."""
        indices = np.asarray(indices, dtype=np.int64)
        size, channels = self.image_size, self.channels
        result = np.zeros((len(indices), size, size, channels), dtype=np.uint8)
        place, inside = self._locate(indices)
        keep = len(self) * channels * size * size <= self._cache_bytes
        for number in np.unique(place):
            rows = np.flatnonzero(place == number)
            if keep and number not in self._decoded:
                every = range(self.rounds[number].count)
                self._decoded[number] = np.stack([self._decode(number, i) for i in every])
            for row in rows:
                member = int(inside[row])
                result[row] = (
                    self._decoded[number][member]
                    if number in self._decoded
                    else self._decode(number, member)
                )
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

    def _column(self, name: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, dtype=np.int64)
        self._locate(indices)
        return np.concatenate(self._columns[name])[indices]

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(indices) and not (0 <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"pool index outside 0 to {len(self) - 1}")
        firsts = np.array([entry.first for entry in self.rounds], dtype=np.int64)
        place = np.searchsorted(firsts, indices, side="right") - 1
        return place, indices - firsts[place] if len(indices) else indices

    def _decode(self, number: int, member: int) -> np.ndarray:
        try:
            sample = self._shards[number][member]
            picture = decode_picture(sample.data, self.channels)
        except BadPicture as error:
            raise UserError(
                f"{self.folder / self.rounds[number].folder}: picture {member} is damaged"
                f" ({error}); restore the pool or go back to an earlier checkpoint"
            ) from None
        size = self.image_size
        return np.asarray(picture).reshape(size, size, self.channels)

    def _check(
        self, images: np.ndarray, labels: Any, seeds: Any, entropies: Any, visible_from: int
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(f"images must be (N, S, S, 1 or 3) uint8, not {images.shape}")
        if images.shape[1] != images.shape[2]:
            raise ValueError(f"images must be square, not {images.shape}")
        if not len(images) == len(labels) == len(seeds) == len(entropies) > 0:
            raise ValueError("a round needs one label, seed index and entropy per picture")
        if self.rounds and images.shape[2:] != (self.image_size, self.channels):
            raise ValueError(f"the pool holds {self.channels} x {self.image_size} pictures")
        if self.rounds and visible_from < self.rounds[-1].visible_from:
            raise ValueError(f"round is visible from {visible_from}, before the round it follows")

    def _lines(self) -> list[str]:
        path = self.folder / _MANIFEST
        if not path.is_file():
            return []
        try:
            return path.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text; restore the pool's manifest") from None

    def _parse(self, number: int, line: str) -> Round:
        where = f"{self.folder / _MANIFEST}, line {number + 1}"
        try:
            content = json.loads(line)
            digest = content.pop("digest")
            entry = Round(**content)
            numbers = (entry.round, entry.first, entry.count, entry.visible_from)
            sound = all(type(value) is int and value >= 0 for value in numbers)
            sound = sound and digest == _digest(entry)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f"{where}: not a round; restore the pool's manifest") from None
        rises = not self.rounds or entry.visible_from >= self.rounds[-1].visible_from
        follows = (number, len(self), f"round-{number:05d}")
        if not (sound and rises and (entry.round, entry.first, entry.folder) == follows):
            raise UserError(f"{where}: damaged, or lines are missing; restore the pool's manifest")
        return entry

    def _admit(self, entry: Round) -> None:
        place = self.folder / entry.folder
        shards = ShardSet(place)
        if len(shards) != entry.count or shards.fingerprint != entry.fingerprint:
            raise UserError(f"{place} is not the round the manifest lists; restore the pool")
        try:
            with np.load(place / "columns.npz", allow_pickle=False) as stored:
                columns = {name: stored[name] for name in _COLUMNS}
        except Exception:  # numpy and zipfile raise many kinds on damaged files
            columns = {}
        if {len(values) for values in columns.values()} != {entry.count}:
            raise UserError(f"{place / 'columns.npz'} is missing or damaged; restore the pool")
        if not np.array_equal(columns["label"], shards.labels):
            raise UserError(f"{place / 'columns.npz'} has other labels than the shards")
        if not self.rounds:
            first = decode_picture(shards[0].data, 3)
            self.image_size = first.height
            self.channels = 1 if Image.open(io.BytesIO(shards[0].data)).mode == "L" else 3
        self.rounds.append(entry)
        self._shards.append(shards)
        for name, values in columns.items():
            self._columns[name].append(values)

    def _write(self, rounds: list[Round]) -> None:
        lines = [json.dumps(asdict(e) | {"digest": _digest(e)}) + "\n" for e in rounds]
        write_bytes_atomic(self.folder / _MANIFEST, "".join(lines).encode())


def _digest(entry: Round) -> str:
    return hashlib.sha256(json.dumps(asdict(entry), sort_keys=True).encode()).hexdigest()


def encode_png(image: np.ndarray) -> bytes:
    """A picture (H, W), (H, W, 1) or (H, W, 3) uint8 as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(buffer, "PNG")
    return buffer.getvalue()


def _samples(
    number: int, images: np.ndarray, columns: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    for row, picture in enumerate(images):
        entropy = float(columns["entropy"][row])
        yield {
            "key": f"r{number:05d}-{row:07d}",
            "image": encode_png(picture),
            "extension": "png",
            "label": int(columns["label"][row]),
            "meta": {
                "seed_index": int(columns["seed_index"][row]),
                "entropy": None if np.isnan(entropy) else entropy,
            },
        }
