"""The parts that a pool of pictures is made of: their folders and the manifest that lists them.

Called by pool.py, by whoever draws parts, and by those who read a pool without its pictures. A part
is a folder of WebDataset shards with `columns.npz` (class, seed index, entropy and pixel hash of
every picture) and `cost.json`. It is named after all that fixes its pictures, so a part that was
drawn and never published, by a process that was killed or for a run that went another way, is used
again or never looked at.
"""

import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from etude.core.errors import UserError
from etude.core.files import flush_folder, write_bytes_atomic, write_json_atomic

from .decode_torch import decode_picture
from .shards import ShardSet, write_shards

MANIFEST = "manifest.jsonl"
COLUMNS = ("label", "seed_index", "entropy", "digest")


@dataclass(frozen=True)
class Part:
    """Some consecutive pictures, as their manifest line says.

    Attributes:
        part: number from 0.
        round: the addition that they belong to, from 0, which are the pictures to start with.
        first, count: they are pool indices first to first + count - 1.
        visible_from: position of the learner's stream from which they are drawn.
        seed: with the seed indices it fixes their noise.
        guidance: how they were guided, JSON-serialisable; None for pictures that were not.
        generator, learner: identity of the weights that drew and that guided ("" for none).
        folder: name of the part's folder inside the pool.
        fingerprint: sha256 of its shards.
    """

    part: int
    round: int
    first: int
    count: int
    visible_from: int
    seed: int
    guidance: Any
    generator: str
    learner: str
    folder: str
    fingerprint: str


@dataclass(frozen=True)
class PartKey:
    """What fixes the pictures of a part; see `Part`. `extra` is for what else does."""

    first: int
    count: int
    seed: int
    guidance: Any
    generator: str
    learner: str
    extra: Any = None

    @cached_property
    def folder(self) -> str:
        """The part's folder inside a pool."""
        content = json.dumps(asdict(self), sort_keys=True)
        return f"part-{self.first:09d}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def write_part(
    pool: str | Path,
    key: PartKey,
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    *,
    seed_indices: Sequence[int] | np.ndarray,
    entropies: Sequence[float] | np.ndarray,
    cost: Mapping[str, float] | None = None,
    per_shard: int = 1000,
) -> Path:
    """Write the folder of a part, whole or not at all; `Pool.publish` makes it count.

    Args:
        pool: the pool's folder.
        images: (N, S, S, C) uint8, C 1 or 3, with N = key.count.
        labels: N class numbers the pictures were asked for.
        seed_indices: N positions whose noise they were drawn from.
        entropies: N entropies of the learner's prediction, in nats; nan where none was taken.
        cost: what drawing them took, by name.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"images must be (N, S, S, 1 or 3) uint8, not {images.shape}")
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"images must be square, not {images.shape}")
    if not len(images) == len(labels) == len(seed_indices) == len(entropies) == key.count > 0:
        raise ValueError("a part needs one label, seed index and entropy per picture")
    columns = {
        "label": np.asarray(labels, dtype=np.int64),
        "seed_index": np.asarray(seed_indices, dtype=np.int64),
        "entropy": np.asarray(entropies, dtype=np.float32),
        "digest": np.stack([picture_digest(image) for image in images]),
    }

    def fill(draft: Path) -> None:
        write_shards(draft, _samples(key.first, images, columns), per_shard=per_shard)
        with io.BytesIO() as buffer:
            np.savez(buffer, **columns)
            write_bytes_atomic(draft / "columns.npz", buffer.getvalue())
        write_json_atomic(draft / "cost.json", dict(cost or {}))

    return _appear(Path(pool) / key.folder, fill)


def link_part(source: str | Path, pool: str | Path) -> Path:
    """The folder of a part of another pool in this one; its files are shared where they can be."""

    def fill(draft: Path) -> None:
        shutil.copytree(source, draft, copy_function=link_file)

    return _appear(Path(pool) / Path(source).name, fill)


def link_file(source: str | Path, target: str | Path) -> None:
    """The same file in another folder, or a copy of it where a file system has no links."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:
        write_bytes_atomic(Path(target), Path(source).read_bytes())


def _appear(place: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a new folder beside `place` and give it that name; whoever comes second gives way."""
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    try:
        fill(draft)
        flush_folder(draft)
        try:
            os.rename(draft, place)
            flush_folder(place.parent)
        except OSError:
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return place


def read_manifest(folder: str | Path) -> list[Part]:
    """The parts that a pool's manifest lists; none where there is no manifest.

    Raises:
        UserError: a line is damaged, or lines are missing.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return []
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; restore the pool's manifest") from None
    parts: list[Part] = []
    for number, line in enumerate(lines):
        parts.append(_parse(f"{path}, line {number + 1}", line, parts))
    return parts


def write_manifest(folder: str | Path, parts: Sequence[Part]) -> None:
    """Replace a pool's manifest, whole or not at all."""
    lines = [json.dumps(asdict(entry) | {"digest": _digest(entry)}) + "\n" for entry in parts]
    write_bytes_atomic(Path(folder) / MANIFEST, "".join(lines).encode())


def _parse(where: str, line: str, before: Sequence[Part]) -> Part:
    try:
        content = json.loads(line)
        digest = content.pop("digest")
        entry = Part(**content)
        numbers = (entry.part, entry.round, entry.first, entry.count, entry.visible_from)
        sound = all(type(value) is int and value >= 0 for value in numbers)
        sound = sound and digest == _digest(entry)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{where}: not a part; restore the pool's manifest") from None
    last = before[-1] if before else None
    rises = last is None or (entry.visible_from >= last.visible_from and entry.round >= last.round)
    follows = (len(before), last.first + last.count if last else 0)
    named = Path(entry.folder).name == entry.folder and entry.folder.startswith("part-")
    if not (sound and rises and named and (entry.part, entry.first) == follows):
        raise UserError(f"{where}: damaged, or lines are missing; restore the pool's manifest")
    return entry


def read_columns(part: str | Path, count: int) -> dict[str, np.ndarray]:
    """Class, seed index, entropy and pixel hash of the pictures of a part, without the pictures."""
    path = Path(part) / "columns.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in COLUMNS}
    except Exception:  # numpy and zipfile raise many kinds on damaged files
        columns = {}
    if {len(values) for values in columns.values()} != {count}:
        raise UserError(f"{path} is missing or damaged; restore the pool")
    return columns


def picture_digest(image: np.ndarray) -> np.ndarray:
    """sha256 of a picture's pixels and shape, (32,) uint8."""
    content = str(image.shape).encode() + np.ascontiguousarray(image).tobytes()
    return np.frombuffer(hashlib.sha256(content).digest(), dtype=np.uint8)


def encode_png(image: np.ndarray) -> bytes:
    """A picture (H, W), (H, W, 1) or (H, W, 3) uint8 as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(buffer, "PNG")
    return buffer.getvalue()


def _digest(entry: Part) -> str:
    return hashlib.sha256(json.dumps(asdict(entry), sort_keys=True).encode()).hexdigest()


def _samples(
    first: int, images: np.ndarray, columns: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    for row, picture in enumerate(images):
        entropy = float(columns["entropy"][row])
        yield {
            "key": f"{first + row:09d}",
            "image": encode_png(picture),
            "extension": "png",
            "label": int(columns["label"][row]),
            "meta": {
                "seed_index": int(columns["seed_index"][row]),
                "entropy": None if np.isnan(entropy) else entropy,
            },
        }


def part_images(part: str | Path) -> np.ndarray:
    """All pictures of a part, (n, S, S, C) uint8, whether it is published or not."""
    shards = ShardSet(part)
    grey = Image.open(io.BytesIO(shards[0].data)).mode == "L"
    pictures = [decode_picture(shards[i].data, 1 if grey else 3) for i in range(len(shards))]
    return np.stack([np.asarray(p).reshape(p.height, p.width, -1) for p in pictures])
