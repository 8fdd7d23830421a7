"""Sets of pictures: shards, files, arrays, or what a generator draws; read by extract.py.

`open_pictures` takes a folder of shards, a folder of picture files, or an `.npz` archive.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from etude.core.errors import UserError
from etude.core.files import read_json
from etude.data.picture import BadPicture
from etude.data.shards import ShardSet

from .arrays import ArrayPictures, NpzPictures
from .decoding import FIT, FITS, Form, files_sha256, pool
from .picture_set import (
    Generator,
    Pictures,
    PictureSet,
    Stages,
    class_numbers,
    digest,
    group_of,
    spread,
    stacked,
)
from .text_files import METADATA, read_metadata

__all__ = [
    "FIT",
    "FITS",
    "ArrayPictures",
    "FolderPictures",
    "GeneratedPictures",
    "Generator",
    "ListedPictures",
    "NpzPictures",
    "PictureSet",
    "Pictures",
    "ShardPictures",
    "Stages",
    "open_pictures",
]


class ShardPictures:
    """The pictures of a folder of shards, in stored order.

    Args:
        size, fit, channels: as in `Form`.
        limit: so many pictures only, spread over classes and groups; 0 all.
        rows: numbers of the samples that are the set, in its order; by default all as stored.
        groups: of each of these pictures; by default its class.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        size: int = 0,
        fit: str = "crop",
        channels: int = 3,
        limit: int = 0,
        rows: Sequence[int] | None = None,
        groups: Sequence[str] | None = None,
    ) -> None:
        self.shards = ShardSet(folder)
        self.name, self.classes = str(folder), list(self.shards.classes)
        every = list(range(len(self.shards)) if rows is None else rows)
        if groups is not None and len(groups) != len(every):
            raise ValueError(f"{len(groups)} groups for {len(every)} pictures")
        strata = self.shards.labels[every].tolist() if groups is None else list(groups)
        some = spread(strata, limit)
        self._rows = [every[i] for i in some]
        self._groups = None if groups is None else [groups[i] for i in some]
        self._form = Form(size, fit, channels)
        # A set as stored keeps the fingerprint that it had before there were rows and groups.
        own = [] if rows is None and len(some) == len(self.shards) else [self._rows]
        own += [] if groups is None else [self._groups]
        parts = [size, channels, len(self._rows), *self._form.parts[2:], *own]
        self.fingerprint = digest(["shards", self.shards.fingerprint, *parts])
        self.protocol = _stated(Path(folder)) | self._form.protocol

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int, stages: Stages) -> Pictures:
        """Pictures start to stop; `UserError` on one that cannot be decoded."""
        with stages("read"):
            try:
                samples = [self.shards[i] for i in self._rows[start:stop]]
            except BadPicture as error:
                raise UserError(f"{self.name}: {error}; copy the shard again") from None
        keys = [sample.key for sample in samples]
        with stages("decode"):
            images = self._form.decode([sample.data for sample in samples], keys, self.name)
        labels = np.array([sample.label for sample in samples], dtype=np.int64)
        groups = [group_of(self.classes, n) for n in labels]
        if self._groups is not None:
            groups = self._groups[start:stop]
        return Pictures(stacked(images), keys, labels, groups)


class ListedPictures:
    """Picture files (JPEG, PNG, WebP and what else Pillow reads) by name, in the order given.

    Args:
        root: the folder that `files` are relative to.
        files: names with "/" between folders.
        name: shown to people; by default the folder.
        keys: of the pictures; by default their files.
        labels: class indices, -1 for none; by default none.
        groups: "" for none; by default the class of each.
        size, fit, channels: as in `Form`.
        limit: so many pictures only, spread over classes and groups; 0 all.
        stated: more that the set says for an evaluation's protocol.

    Attributes:
        files, keys, labels (N,) int64, groups: as given, of the pictures that are taken.

    Raises:
        UserError: a file is not there.
    """

    def __init__(
        self,
        root: str | Path,
        files: Sequence[str],
        *,
        name: str = "",
        keys: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        groups: Sequence[str] | None = None,
        classes: Sequence[str] = (),
        size: int = 0,
        fit: str = "crop",
        channels: int = 3,
        limit: int = 0,
        stated: dict[str, Any] | None = None,
    ) -> None:
        self.root, self.name, self.classes = Path(root), name or str(root), list(classes)
        every = list(files)
        given = [-1] * len(every) if labels is None else list(labels)
        own = [group_of(self.classes, n) for n in given] if groups is None else list(groups)
        whole = every, every if keys is None else list(keys), given, own
        if len({len(column) for column in whole}) != 1:
            raise ValueError(f"{self.name}: files, keys, labels and groups differ in number")
        some = spread(list(zip(given, own, strict=True)), limit)
        self.files, self.keys, given, self.groups = ([of[i] for i in some] for of in whole)
        self.labels = np.array(given, np.int64)
        self._form = Form(size, fit, channels)
        self.protocol = (stated or {}) | self._form.protocol
        absent = first_absent(self.root, self.files)
        if absent:
            raise UserError(f"{self.name}: {absent} is not in {self.root}; copy the pictures again")

    def __len__(self) -> int:
        return len(self.files)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of names, bytes, labels, groups and form; made from the files when first asked."""
        hashes = files_sha256([self.root / file for file in self.files])
        about = [self.files, hashes, self.keys, self.labels.tolist(), self.groups]
        return digest(["files", *about, self.classes, *self._form.parts])

    def read(self, start: int, stop: int, stages: Stages) -> Pictures:
        """Pictures start to stop; `UserError` on one that cannot be decoded."""
        keys = self.keys[start:stop]
        with stages("read"):
            data = list(pool().map(self._bytes, self.files[start:stop]))
        with stages("decode"):
            images = self._form.decode(data, keys, self.name)
        labels, groups = self.labels[start:stop].copy(), self.groups[start:stop]
        return Pictures(stacked(images), keys, labels, groups)

    def _bytes(self, file: str) -> bytes:
        try:
            return (self.root / file).read_bytes()
        except OSError as error:
            raise UserError(f"{self.root / file} cannot be read ({error.strerror})") from None


class FolderPictures(ListedPictures):
    """The pictures of a folder, sorted; class subfolders give labels and groups, or a table does.

    Args:
        folder: with a `metadata.csv` that has a column file_name, its rows are the set, and its
            columns label and group, where there are any, give each picture's class and group.
        classes: class names of the real pictures, so that labels mean the same; by default the
            sorted names of the subfolders or of the table.
        size, fit, channels, limit: as in `ListedPictures`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        size: int = 0,
        fit: str = "crop",
        channels: int = 3,
        limit: int = 0,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {folder}; name one that holds pictures")
        table = _table(self.folder)
        rows = table or [
            # A file's class: the first folder that it lies in; "" for none.
            _Row(path.as_posix(), path.parts[0] if len(path.parts) > 1 else "")
            for path in _files(self.folder)
            if path.suffix.lower() in SUFFIXES | OTHERS
        ]
        for row in rows:
            if Path(row.file).suffix.lower() not in SUFFIXES:
                raise UserError(
                    f"{self.folder / row.file} is no .png, .jpg or .webp picture; convert it, or"
                    " take it out of the folder and its table"
                )
        if not rows:
            raise UserError(
                f"{folder} holds no .png, .jpg or .webp pictures; name a folder that does"
            )
        found = sorted({row.label for row in rows} - {""})
        if all(label.isdecimal() for label in found):  # classes 0 to 11 in the order of numbers
            found.sort(key=lambda label: (int(label), label))
        names = found if classes is None else list(classes)
        places = {name: place for place, name in enumerate(names)}
        labels = [places.get(row.label, -1) for row in rows]
        grouped = any(row.group for row in rows)
        super().__init__(
            self.folder,
            [row.file for row in rows],
            labels=labels,
            groups=[row.group for row in rows] if grouped else None,
            classes=names,
            size=size,
            fit=fit,
            channels=channels,
            limit=limit,
            stated=_stated(self.folder),
        )


class GeneratedPictures:
    """Pictures 0 to count - 1 of a generator, classes in turn; of one asked by text its prompts in
    turn, without labels.

    Args:
        seed: names the sequence of pictures.
        classes: class names, which are asked for by name where the generator knows some; empty
            asks for label 0 throughout.
        size, fit, channels: as in `Form`, so that drawn pictures take the steps of the real ones;
            by default they are kept as drawn.
    """

    def __init__(
        self,
        generator: Generator,
        count: int,
        *,
        seed: int = 0,
        classes: Sequence[str] = (),
        size: int = 0,
        fit: str = "crop",
        channels: int = 0,
    ) -> None:
        self.generator, self._count, self.seed = generator, count, seed
        self.name, self.classes = generator.name, list(classes)
        self._labelled = "prompts" not in generator.protocol
        by_class = self._labelled and bool(self.classes)
        theirs = getattr(generator, "classes", ()) if by_class else ()
        self._numbers = class_numbers(theirs, self.classes, self.name, "the real set")
        self._form = Form(size, fit, channels)
        labels = "in turn" if self._labelled else "none"
        drawn = dict(generator.protocol) | {"seed": seed, "labels": labels}
        form = [self._form.parts] if size or channels else []
        form += [self._numbers] if self._numbers != sorted(self._numbers) else []
        self.fingerprint = digest(
            ["generated", generator.fingerprint, drawn, count, self.classes, *form]
        )
        self.protocol = drawn | self._form.protocol

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int, stages: Stages) -> Pictures:
        """Draws pictures start to stop."""
        indices = np.arange(start, stop, dtype=np.int64)
        labels = (
            indices % max(len(self.classes), 1) if self._labelled else np.full_like(indices, -1)
        )
        with stages("draw"):
            asked = np.array(self._numbers, np.int64)[labels] if self._numbers else labels
            drawn = self.generator.draw(indices, asked, seed=self.seed)
        images = np.asarray(drawn[0] if isinstance(drawn, tuple) else drawn)
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(indices):
            raise ValueError(f"{self.name} drew {images.dtype} {images.shape}, not uint8 BHWC")
        images = stacked([self._form.array(image) for image in images])
        keys = [f"{self.seed}/{index:09d}" for index in indices]
        return Pictures(images, keys, labels, [group_of(self.classes, n) for n in labels])


def open_pictures(
    source: str | Path,
    *,
    size: int = 0,
    fit: str = "crop",
    channels: int = 3,
    limit: int = 0,
    classes: Sequence[str] | None = None,
) -> PictureSet:
    """A folder of shards or of picture files, or an `.npz` archive, whichever it is.

    Args:
        classes: class names that the labels of a folder of files follow; others bring their own.
    """
    path = Path(source)
    form = {"size": size, "fit": fit, "channels": channels, "limit": limit}
    if path.suffix == ".npz":
        return NpzPictures(path, classes=classes or (), **form)
    if not path.is_dir():
        raise UserError(
            f"{path} is not a folder; name a folder of shards or of pictures, or an .npz archive"
        )
    if any(path.glob("*.tar")):
        return ShardPictures(path, **form)
    return FolderPictures(path, classes=classes, **form)


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
OTHERS = {".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".jxl", ".ppm"}  # pictures not read


@dataclass(frozen=True)
class _Row:
    """One picture of a folder, with its class and group."""

    file: str
    label: str = ""
    group: str = ""


def _files(folder: Path) -> list[Path]:
    """Every file below a folder, relative to it and sorted; links to folders are followed, and what
    is hidden or beside pictures in an archive of macOS is left out.
    """
    found = []
    for where, folders, files in os.walk(folder, followlinks=True):
        here = Path(where).resolve()
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and name != "__MACOSX"
            and not here.is_relative_to((here / name).resolve())  # a link to where it lies in
        ]
        relative = Path(where).relative_to(folder)
        found += [relative / name for name in files if not name.startswith(".")]
    return sorted(found)


def first_absent(root: Path, files: Sequence[str]) -> str:
    """The first of `files` that is not below `root`, or ""; each folder is listed once."""
    listed: dict[str, set[str]] = {}
    for file in files:
        parent, _, name = file.rpartition("/")
        if parent not in listed:
            folder = root / parent
            listed[parent] = set(os.listdir(folder)) if folder.is_dir() else set()
        if name not in listed[parent]:
            return file
    return ""


def _table(folder: Path) -> list[_Row]:
    """The rows of a folder's `metadata.csv`, sorted by file; empty where there is none."""
    found = read_metadata(folder)
    missing = next((name for name in found if not (folder / name).is_file()), None)
    if missing is not None:
        raise UserError(
            f"{folder / METADATA} names {missing}, which is not there: copy the folder again"
        )
    rows = [(file, found[file]) for file in sorted(found, key=Path)]
    return [_Row(file, row.get("label", ""), row.get("group", "")) for file, row in rows]


def _stated(folder: Path) -> dict[str, Any]:
    """What the writer of a folder says for the protocol."""
    path = folder / "protocol.json"
    stated = read_json(path) if path.exists() else {}
    if not isinstance(stated, dict):
        raise UserError(f"{path} holds no fields of a protocol; delete it or copy it again")
    return stated
