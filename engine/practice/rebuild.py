"""A pool drawn again from its seeds, or written out for others; called by the `practice` command.

A pool's manifest, columns, learners and `origin.json` fix its pictures, so they can be sent without
the shards, which weigh far more, and drawn again where the generator is. Equal
blocks on equal hardware give equal bytes; elsewhere a picture differs by rounding, which is what
the report says.
"""

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etude.core.errors import UserError
from etude.core.files import read_json, write_bytes_atomic, write_json_atomic
from etude.core.log import Log
from etude.data.files import new_folder
from etude.data.pool import Pool
from etude.data.pool_parts import (
    Part,
    PartKey,
    part_images,
    picture_digest,
    read_columns,
    read_manifest,
    write_part,
)
from etude.data.shards import ShardSet

from .learner_config import LearnerConfig
from .supply import ORIGIN, Generator, Studio, extra_of, learner_file

TABLE = "metadata.csv"


@dataclass(frozen=True)
class Rebuilt:
    """How the pictures that were drawn again compare with those of the manifest.

    Attributes:
        pictures: how many there are.
        identical: how many have the same pixels.
        compared: of how many the old ones were there to be compared.
        largest: the largest difference of these, in levels of 255.
        differing: share of their pixels that differ at all.
    """

    pictures: int
    identical: int
    compared: int
    largest: int
    differing: float

    def __str__(self) -> str:
        share = f"{self.identical:,} of {self.pictures:,} pictures are identical"
        share += f" ({self.identical / max(self.pictures, 1):.2%})"
        if not self.compared:
            return share
        return (
            f"{share}; of {self.compared:,} that were here {self.differing:.4%} of the pixels"
            f" differ, by at most {self.largest} levels of 255"
        )


def open_origin(pool: Path) -> dict[str, Any]:
    """What a pool says of where its pictures come from; `UserError` where it says nothing."""
    if not (pool / ORIGIN).exists():
        raise UserError(
            f"{pool} has no {ORIGIN}, so it cannot be drawn again: name a pool of a practice run"
        )
    return read_json(pool / ORIGIN)


def rebuild(
    pool: Path,
    to: Path,
    open_generator: Callable[[], Generator],
    device: torch.device,
    log: Log,
) -> Rebuilt:
    """Draw a pool's pictures again, into a pool of its own; goes on where it was interrupted.

    Args:
        pool: its manifest, columns and learners; its shards may be missing.
        to: the new pool's folder.
        open_generator: the generator that the pool names.

    Raises:
        UserError: another generator, a missing learner or column, or no pool.
    """
    parts, origin = read_manifest(pool), open_origin(pool)
    if not parts:
        raise UserError(f"{pool} has no manifest: name a pool's folder, such as RUN/pools/practice")
    if pool.resolve() == to.resolve():
        raise UserError(f"{to} is the pool itself: name another folder to draw into")
    generator = open_generator()
    if drawn_by := {entry.generator for entry in parts} - {generator.fingerprint}:
        raise UserError(
            f"{pool} was drawn by {', '.join(sorted(drawn_by))} and this generator is "
            f"{generator.fingerprint}: name the run that drew it with --generator"
        )
    write_json_atomic(to / ORIGIN, origin)
    learner = LearnerConfig.model_validate(origin["learner"])
    studio = Studio(lambda: generator, learner, to.parent, device)
    counts = np.zeros(5, dtype=np.int64)  # pictures, identical, compared, pixels, pixels differing
    largest, keys = 0, []
    with log.progress("drawing again", sum(entry.count for entry in parts), "pictures") as bar:
        for entry in parts:
            columns = read_columns(pool / entry.folder, entry.count)
            key = _key_of(entry, columns["seed_index"], origin)
            images = _draw(key, columns, pool, to, studio)
            keys.append((key, entry))
            digests = np.stack([picture_digest(image) for image in images])
            same = (digests == columns["digest"]).all(axis=1)
            counts[:2] += entry.count, int(same.sum())
            if any((pool / entry.folder).glob("*.tar")):
                gap = np.abs(part_images(pool / entry.folder).astype(np.int16) - images)
                counts[2:] += entry.count, gap.size, int((gap > 0).sum())
                largest = max(largest, int(gap.max()))
            bar.advance(entry.count)
    _publish(to, keys)
    pictures, identical, compared, pixels, differing = counts.tolist()
    return Rebuilt(pictures, identical, compared, largest, differing / max(pixels, 1))


def _key_of(entry: Part, seed_indices: np.ndarray, origin: dict[str, Any]) -> PartKey:
    chosen = isinstance(entry.guidance, dict) and "prune" in entry.guidance
    extra = extra_of(origin["protocol"], len(origin["classes"]), seed_indices if chosen else None)
    return PartKey(
        entry.first,
        entry.count,
        entry.seed,
        entry.guidance,
        entry.generator,
        entry.learner,
        extra,
    )


def _draw(
    key: PartKey, columns: dict[str, np.ndarray], pool: Path, to: Path, studio: Studio
) -> np.ndarray:
    """The pictures of a part, drawn unless an earlier call did."""
    if (to / key.folder).is_dir():
        return part_images(to / key.folder)
    guided = bool(key.learner) and "prune" not in (key.guidance or {})
    if guided:
        source, copy = (learner_file(root, key.learner) for root in (pool, to))
        if not copy.exists():
            if not source.exists():
                raise UserError(f"{source} is missing: send the pool's folder learners/ too")
            write_bytes_atomic(copy, source.read_bytes())
    images, entropies, cost = studio.draw_indices(
        to.name,
        columns["seed_index"],
        columns["label"],
        seed=key.seed,
        learner=key.learner if guided else "",
        guidance=key.guidance if guided else None,
    )
    write_part(
        to,
        key,
        images,
        columns["label"],
        seed_indices=columns["seed_index"],
        entropies=entropies,
        cost=cost,
    )
    return images


def _publish(to: Path, keys: list[tuple[PartKey, Part]]) -> None:
    """Publish the parts by rounds, as they were."""
    rebuilt = Pool(to)
    rounds: dict[tuple[int, int], list[PartKey]] = {}
    for key, entry in keys[len(rebuilt.parts) :]:
        rounds.setdefault((entry.round, entry.visible_from), []).append(key)
    for (number, position), some in rounds.items():
        rebuilt.publish(some, round_number=number, visible_from=position)


def export(pool: Path, to: Path, log: Log) -> int:
    """Write a pool as a folder of PNG files per class and a table; returns the number of pictures.

    The table, `metadata.csv`, holds file name, label, class, round, seed index, entropy when drawn
    and learner of every picture.

    Raises:
        UserError: no pool, or the folder holds something.
    """
    opened = Pool(pool)
    if not len(opened):
        raise UserError(
            f"{pool} holds no picture: name a pool's folder, such as RUN/pools/practice"
        )
    classes = open_origin(pool)["classes"] if (pool / ORIGIN).exists() else []
    folders = _folder_names(classes, int(opened.labels(np.arange(len(opened))).max()) + 1)
    rows = []
    with new_folder(to) as draft, log.progress("writing", len(opened), "pictures") as bar:
        for name in folders:
            (draft / name).mkdir(exist_ok=True)
        for entry in opened.parts:
            shards, columns = (
                ShardSet(pool / entry.folder),
                read_columns(pool / entry.folder, entry.count),
            )
            for member in range(entry.count):
                sample, label = shards[member], int(columns["label"][member])
                name = f"{folders[label]}/{entry.first + member:09d}.{sample.extension}"
                (draft / name).write_bytes(sample.data)
                entropy = float(columns["entropy"][member])
                rows.append(
                    [
                        name,
                        label,
                        classes[label] if label < len(classes) else "",
                        entry.round,
                        int(columns["seed_index"][member]),
                        "" if np.isnan(entropy) else f"{entropy:.6g}",
                        entry.learner,
                    ]
                )
            bar.advance(entry.count)
        buffer = io.StringIO()
        table = csv.writer(buffer, lineterminator="\n")
        table.writerow(["file_name", "label", "class", "round", "seed_index", "entropy", "learner"])
        table.writerows(rows)
        write_bytes_atomic(draft / TABLE, buffer.getvalue().encode())
    return len(rows)


def _folder_names(classes: list[str], count: int) -> list[str]:
    """A folder for each class: its name as far as a file system takes it, or its number."""
    names = [re.sub(r"[^\w .,()+-]+", "_", name).strip(" .") for name in classes]
    names += [""] * (count - len(names))
    if len({name.lower() for name in names}) < len(names) or "" in names:
        return [f"{label:04d} {name}".strip() for label, name in enumerate(names)]
    return names
