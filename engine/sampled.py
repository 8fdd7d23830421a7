"""A folder of drawn pictures, in shards or as PNG files, with the protocol beside them.

What `etude sample` writes. Pictures are drawn in the generator's blocks, which processes share and
which are kept beside the folder until all are there: an interrupted call goes on with the first
block that is missing, and the folder appears whole or not at all.
"""

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from etude.core.distributed import (
    FOREVER_S,
    World,
    all_agree,
    any_rank,
    barrier,
    exchange,
    local_facts,
)
from etude.core.errors import UserError
from etude.core.files import read_json, write_bytes_atomic, write_json_atomic
from etude.core.log import Log
from etude.core.run import load_run
from etude.core.signals import StopRequested
from etude.data.decode_torch import decode_picture
from etude.data.files import new_folder
from etude.data.shards import ShardSet, write_shards

from .pictures import picture_grid, png
from .published import is_published
from .sampling import BLOCK, Generator, balanced_labels, stated_prompts
from .stable_diffusion import is_stable_diffusion

Format = Literal["shards", "png"]
TABLE = "metadata.csv"  # of a folder of PNG files: file_name, label, caption
# What only a folder of a format holds.
_MARK = {"shards": "index.json", "png": TABLE}


@dataclass(frozen=True)
class Asked:
    """What each picture is asked by.

    Attributes:
        classes: names in index order; empty for a model asked by text.
        labels: classes drawn in turn; all of them when empty.
        prompts: texts drawn in turn; empty for a model asked by class.
    """

    classes: list[str]
    labels: list[int]
    prompts: list[str]

    @classmethod
    def of(cls, generator: Generator, labels: Sequence[int], prompts: Sequence[str]) -> "Asked":
        """Labels and prompts as somebody gave them; the generator's own prompts where none are.

        Raises:
            UserError: a label is not one of the classes, or the model is asked otherwise.
        """
        if not generator.asked_by_text and prompts:
            raise UserError(f"{generator.name} is asked by class, not by text: give --label")
        if not generator.asked_by_text:
            last = max(generator.num_classes, 1) - 1
            wrong = [label for label in labels if not 0 <= label <= last]
            if wrong:
                raise UserError(
                    f"{generator.name} has no class {wrong[0]}: give labels from 0 to {last}"
                )
            return cls(list(generator.classes), list(labels), [])
        if labels:
            raise UserError(f"{generator.name} is asked by text, not by class: give --prompt")
        if not (prompts or generator.prompts):
            raise UserError(f"{generator.name} is asked by text: give --prompt or --prompts FILE")
        return cls([], [], list(prompts or generator.prompts))

    def label(self, indices: np.ndarray) -> np.ndarray:
        """Labels of pictures, (n,) int64."""
        if self.labels:
            return np.asarray(self.labels, np.int64)[indices % len(self.labels)]
        return balanced_labels(indices, len(self.classes))

    def texts(self, indices: np.ndarray) -> list[str] | None:
        """Prompts of pictures; None for a model asked by class."""
        if not self.prompts:
            return None
        return [self.prompts[index % len(self.prompts)] for index in indices]


def sampling_protocol(
    generator: Generator,
    count: int,
    seed: int,
    labels: Sequence[int] = (),
    prompts: Sequence[str] = (),
) -> dict:
    """What fixes a folder of drawn pictures; written beside them."""
    asked = Asked.of(generator, labels, prompts)
    if asked.prompts:
        by = {"prompts": stated_prompts(asked.prompts)}
    else:
        by = {"labels": asked.labels or "in turn"}
    return generator.protocol | {"seed": seed, "count": count} | by


def sample_folder(run: str | Path, protocol: dict, form: str = "shards") -> Path:
    """Where pictures of a protocol live when nobody says where: inside their run."""
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:10]
    apart = is_published(run) or is_stable_diffusion(run)
    folder = Path(run) if apart else load_run(run)[1]
    return folder / "samples" / (digest if form == "shards" else f"{digest}-{form}")


def sample_to_folder(
    generator: Generator,
    folder: Path,
    count: int,
    *,
    seed: int,
    log: Log,
    labels: Sequence[int] = (),
    prompts: Sequence[str] = (),
    form: str = "shards",
    world: World | None = None,
) -> Path:
    """Draw `count` pictures into a folder; the same call goes on with an interrupted one.

    Args:
        labels: classes to draw in turn; all of them when empty.
        prompts: of a model asked by text, drawn in turn; the generator's own when empty.
        form: "shards" for WebDataset shards; "png" for `000000000.png`, ... and `metadata.csv` with
            the columns file_name, label and caption.
        world: processes that share the blocks, all of which call this; None: this one alone.

    Raises:
        UserError: the folder holds other pictures or something else, a label is not one of the
            classes, or the model is asked otherwise.
    """
    folder = Path(folder)
    asked = Asked.of(generator, labels, prompts)
    if form not in get_args(Format):
        raise UserError(f"pictures are not written as {form!r}: give shards or png")
    if count < 1:
        raise UserError(f"{count} pictures were asked for: ask for at least one")
    protocol = sampling_protocol(generator, count, seed, labels, prompts)
    parts = folder.with_name(f".{folder.name}.blocks")
    lead = world is None or world.rank == 0
    if world is not None and world.size > 1:
        stated = json.dumps(protocol, sort_keys=True)
        all_agree(world, local_facts(pictures=stated), folder.parent)
    done = _is_done(folder, parts, protocol, form)
    if not done:
        if lead:
            write_json_atomic(parts / "protocol.json", protocol)
        if world is not None:  # no block is drawn before every process has looked for others'
            barrier(world, "the pictures' protocol")
        _draw(generator, parts, count, seed, asked, log, world)
    if lead:
        if not done:
            with new_folder(folder) as draft:
                _write(draft, parts, count, asked, form)
                write_json_atomic(draft / "protocol.json", protocol)
        shutil.rmtree(parts, ignore_errors=True)
    if world is not None:
        exchange(world, "pictures are written", None, FOREVER_S)
    return folder


def contact_sheet(folder: Path, limit: int = 100) -> Path:
    """A PNG of the first pictures of a folder: inside it, or beside a folder of PNG files."""
    folder = Path(folder)
    if (folder / TABLE).exists():
        data = [path.read_bytes() for path in sorted(folder.glob("*.png"))[:limit]]
        path = folder.with_name(f"{folder.name}-contact-sheet.png")
    else:
        samples = ShardSet(folder)
        data = [samples[i].data for i in range(min(limit, len(samples)))]
        path = folder / "contact-sheet.png"
    pictures = np.stack([np.asarray(decode_picture(one, channels=3)) for one in data])
    path.write_bytes(png(picture_grid(pictures, columns=10)))
    return path


def _is_done(folder: Path, parts: Path, protocol: dict, form: str) -> bool:
    """Whether the pictures are there; refuses a folder, or blocks, of anything else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder")
    stated = _stated(folder)
    if stated not in (None, protocol):
        raise UserError(f"{folder} holds pictures of another protocol: name another folder")
    if folder.exists() and any(folder.iterdir()):
        if stated is None or not (folder / _MARK[form]).exists():
            raise UserError(f"{folder} is not empty and holds no {form}: name another folder")
        return True
    if any(parts.glob("*.npy")) and _stated(parts) != protocol:
        raise UserError(
            f"{parts} holds blocks of other pictures, of a call that did not end: remove it, or"
            " name another folder"
        )
    return False


def _stated(folder: Path) -> dict | None:
    path = folder / "protocol.json"
    return read_json(path) if path.exists() else None


def _draw(
    generator: Generator,
    parts: Path,
    count: int,
    seed: int,
    asked: Asked,
    log: Log,
    world: World | None,
) -> None:
    """Fill the blocks that are missing, each process the next one of every round.

    A request to stop one process stops all of them after the round.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    with log.progress("sampling", count, unit="pictures") as progress:
        for start in range(0, count, size * BLOCK):
            first = start + rank * BLOCK
            if first < count:
                _draw_block(generator, _block(parts, first), first, count, seed, asked)
            stopped = None
            try:
                progress.advance(min(size * BLOCK, count - start))
            except StopRequested as reason:
                stopped = reason
            if any_rank(world, stopped is not None) if world else stopped:
                raise stopped or StopRequested("another process was asked to stop")


def _block(parts: Path, first: int) -> Path:
    return parts / f"{first:09d}.npy"


def _draw_block(
    generator: Generator, target: Path, first: int, count: int, seed: int, asked: Asked
) -> None:
    if target.exists():
        return
    indices = np.arange(first, min(first + BLOCK, count))
    images, _ = generator.draw(
        indices, asked.label(indices), seed=seed, captions=asked.texts(indices)
    )
    stream = io.BytesIO()
    np.save(stream, images)
    write_bytes_atomic(target, stream.getvalue())


def _write(draft: Path, parts: Path, count: int, asked: Asked, form: str) -> None:
    samples = _samples(parts, count, asked)
    if form == "shards":
        write_shards(draft, samples, classes=asked.classes)
        return
    with (draft / TABLE).open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(("file_name", "label", "caption"))
        for sample in samples:
            name = f"{sample['key']}.png"
            (draft / name).write_bytes(sample["image"])
            caption = sample["caption"] if asked.prompts else ""
            rows.writerow((name, "" if asked.prompts else sample["caption"], caption))


def _samples(parts: Path, count: int, asked: Asked) -> Iterator[dict]:
    """The pictures in order, as `write_shards` takes them; a class's caption is its name."""
    for first in range(0, count, BLOCK):
        images = np.load(_block(parts, first))
        indices = first + np.arange(len(images))
        texts = asked.texts(indices)
        for row, (index, label) in enumerate(zip(indices, asked.label(indices), strict=True)):
            image = images[row, ..., 0] if images.shape[-1] == 1 else images[row]
            sample = {"key": f"{index:09d}", "extension": "png", "image": png(image)}
            if texts is not None:
                yield sample | {"caption": texts[row]}
            else:
                name = asked.classes[label] if asked.classes else ""
                yield sample | {"label": int(label), "caption": name}
