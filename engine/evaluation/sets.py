"""What a set of pictures is: real shards, a folder of PNGs, or a generator; read by extract.py.

Whatever it comes from, a set has a fingerprint and gives uint8 pictures (B, H, W, C) with sample
keys, labels and groups for any range of its consecutive numbers, so extraction resumes anywhere.
"""

import csv
import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from etude.core.errors import UserError
from etude.core.files import file_sha256
from etude.data.decode_torch import decode_picture
from etude.data.picture import BadPicture
from etude.data.shards import ShardSet

FIT = "central square, antialiased bicubic"


@dataclass
class Stages:
    """Seconds spent per stage of a pipeline."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time of the block towards `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Pictures:
    """Consecutive pictures: images (B, H, W, C) uint8, keys, labels (B,) int64, groups."""

    images: np.ndarray
    keys: list[str]
    labels: np.ndarray
    groups: list[str]


class PictureSet(Protocol):
    """A numbered set of pictures of one size.

    Attributes:
        name: shown to people.
        fingerprint: sha256 of everything that fixes the pictures.
        classes: class names, empty without labels.
        protocol: what the set adds to an evaluation's protocol.
    """

    name: str
    fingerprint: str
    classes: list[str]
    protocol: dict[str, Any]

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int, stages: Stages) -> Pictures:
        """Pictures start to stop (exclusive)."""
        ...


class Generator(Protocol):
    """What draws pictures; `etude.sampling.Generator` is one."""

    name: str
    fingerprint: str

    @property
    def protocol(self) -> dict[str, Any]: ...

    def draw(self, indices: np.ndarray, labels: np.ndarray, *, seed: int) -> Any:
        """uint8 (B, H, W, C), alone or first in a tuple, of indices and labels (B,) int64."""
        ...


class _Encoded:
    """Encoded pictures decoded by a few threads, fitted to one square size."""

    def __init__(self, size: int, channels: int) -> None:
        self.size, self.channels = size, channels
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")

    def decode(self, data: list[bytes | memoryview], keys: list[str], where: str) -> np.ndarray:
        images = list(self._pool.map(self._one, data, keys, [where] * len(keys)))
        for image, key in zip(images, keys, strict=True):
            if image.shape != images[0].shape:
                raise UserError(
                    f"{where}: picture {key} is {image.shape[1]} x {image.shape[0]} and "
                    f"{keys[0]} is {images[0].shape[1]} x {images[0].shape[0]}; "
                    f"set image_size=PIXELS to bring them to one size"
                )
        return np.stack(images)

    def _one(self, data: bytes | memoryview, key: str, where: str) -> np.ndarray:
        try:
            image = decode_picture(data, self.channels)
        except BadPicture as error:
            raise UserError(
                f"{where}: picture {key} cannot be used: {error}; remove it, since a figure "
                f"over fewer pictures than stated would be wrong"
            ) from None
        image = _fit(image, self.size) if self.size else image
        return np.asarray(image).reshape(image.height, image.width, self.channels)


def _fit(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.BICUBIC)


class ShardPictures:
    """The pictures of a folder of shards, in stored order.

    Args:
        size: side that every picture is brought to; 0 keeps the stored size.
        channels: 1 or 3.
        limit: the first so many pictures only; 0 all.
    """

    def __init__(
        self, folder: str | Path, *, size: int = 0, channels: int = 3, limit: int = 0
    ) -> None:
        self.shards = ShardSet(folder)
        self.name, self.classes = str(folder), list(self.shards.classes)
        self._count = min(limit or len(self.shards), len(self.shards))
        self._encoded = _Encoded(size, channels)
        self.fingerprint = _sha256(["shards", self.shards.fingerprint, size, channels, self._count])
        stated = Path(folder) / "protocol.json"
        self.protocol = json.loads(stated.read_text()) if stated.exists() else {}

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int, stages: Stages) -> Pictures:
        """Pictures start to stop; `UserError` on one that cannot be decoded."""
        with stages("read"):
            try:
                samples = [self.shards[i] for i in range(start, stop)]
            except BadPicture as error:
                raise UserError(f"{self.name}: {error}; copy the shard again") from None
        keys = [sample.key for sample in samples]
        with stages("decode"):
            images = self._encoded.decode([sample.data for sample in samples], keys, self.name)
        labels = np.array([sample.label for sample in samples], dtype=np.int64)
        return Pictures(images, keys, labels, [_group(self.classes, n) for n in labels])


class FolderPictures:
    """The PNG and JPEG files of a folder, sorted; class subfolders give labels, or a table does.

    Args:
        folder: with a `metadata.csv` that has a column file_name, its rows are the set, and their
            column label, if there is one, names the classes.
        classes: class names of the real pictures, so that labels mean the same; by default the
            sorted names of the subfolders or of the table.
        size, channels: as in `ShardPictures`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        size: int = 0,
        channels: int = 3,
        classes: list[str] | None = None,
    ) -> None:
        self.folder, self.name = Path(folder), str(folder)
        table = _table(self.folder)
        files = table or [p.relative_to(folder) for p in sorted(self.folder.rglob("*"))]
        self._files = [path for path in files if path.suffix.lower() in _SUFFIXES]
        if not self._files:
            raise UserError(f"{folder} holds no .png or .jpg pictures; name a folder that does")
        # A file's class: its row's, or the first folder that it lies in; "" for none.
        self._names = table or {p: p.parts[0] if len(p.parts) > 1 else "" for p in self._files}
        found = sorted({self._names[path] for path in self._files} - {""})
        self.classes = found if classes is None else classes
        self._encoded = _Encoded(size, channels)
        hashes = [[str(path), file_sha256(self.folder / path)] for path in self._files]
        parts = ["folder", hashes, self.classes, size, channels]
        self.fingerprint = _sha256([*parts, [*table.values()]] if table else parts)
        stated = self.folder / "protocol.json"
        self.protocol = json.loads(stated.read_text()) if stated.exists() else {}

    def __len__(self) -> int:
        return len(self._files)

    def read(self, start: int, stop: int, stages: Stages) -> Pictures:
        """Pictures start to stop; `UserError` on one that cannot be decoded."""
        files = self._files[start:stop]
        with stages("read"):
            data = [(self.folder / path).read_bytes() for path in files]
        keys = [path.as_posix() for path in files]
        with stages("decode"):
            images = self._encoded.decode(data, keys, self.name)
        labels = np.array([self._label(path) for path in files], dtype=np.int64)
        return Pictures(images, keys, labels, [_group(self.classes, n) for n in labels])

    def _label(self, path: Path) -> int:
        name = self._names[path]
        return self.classes.index(name) if name in self.classes else -1


class GeneratedPictures:
    """Pictures 0 to count - 1 of a generator, classes in turn; of one asked by text its prompts in
    turn, without labels.

    Args:
        seed: names the sequence of pictures.
        classes: class names; empty asks for label 0 throughout.
    """

    def __init__(
        self, generator: Generator, count: int, *, seed: int = 0, classes: list[str] = ()
    ) -> None:
        self.generator, self._count, self.seed = generator, count, seed
        self.name, self.classes = generator.name, list(classes)
        self._labelled = "prompts" not in generator.protocol
        labels = "in turn" if self._labelled else "none"
        self.protocol = dict(generator.protocol) | {"seed": seed, "labels": labels}
        parts = [generator.fingerprint, self.protocol, count, self.classes]
        self.fingerprint = _sha256(["generated", *parts])

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int, stages: Stages) -> Pictures:
        """Draws pictures start to stop."""
        indices = np.arange(start, stop, dtype=np.int64)
        labels = (
            indices % max(len(self.classes), 1) if self._labelled else np.full_like(indices, -1)
        )
        with stages("draw"):
            drawn = self.generator.draw(indices, labels, seed=self.seed)
        images = np.asarray(drawn[0] if isinstance(drawn, tuple) else drawn)
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(indices):
            raise ValueError(f"{self.name} drew {images.dtype} {images.shape}, not uint8 BHWC")
        keys = [f"{self.seed}/{index:09d}" for index in indices]
        return Pictures(images, keys, labels, [_group(self.classes, n) for n in labels])


def open_pictures(
    folder: str | Path, *, size: int = 0, channels: int = 3, classes: list[str] | None = None
) -> PictureSet:
    """A folder of shards or of picture files, whichever it is."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; name a folder of shards or of pictures")
    if any(path.glob("*.tar")):
        return ShardPictures(path, size=size, channels=channels)
    return FolderPictures(path, size=size, channels=channels, classes=classes)


_SUFFIXES = {".png", ".jpg", ".jpeg"}


def _table(folder: Path) -> dict[Path, str]:
    """File -> class, sorted, of a folder's `metadata.csv`; empty where there is none."""
    path = folder / "metadata.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("file_name")]
    found = {Path(row["file_name"]): row.get("label") or "" for row in rows}
    missing = next((name for name in found if not (folder / name).is_file()), None)
    if missing is not None:
        raise UserError(f"{path} names {missing}, which is not there: copy the folder again")
    return dict(sorted(found.items()))


def _group(classes: list[str], label: int) -> str:
    return classes[label] if 0 <= label < len(classes) else ""


def _sha256(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
