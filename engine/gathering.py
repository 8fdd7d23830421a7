"""A folder of somebody's pictures, read: which are sound, what they are called, which are twins.

Called by starting.py. Classes come from subfolders, captions from `.txt` files beside the pictures
or from one CSV table. Near-duplicates are found by a 64-bit difference hash (N. Krawetz 2013,
"Kind of like that": is each cell of an 9 x 8 grey thumbnail darker than its right neighbour) and
confirmed on a 16 x 16 thumbnail, because flat pictures share hashes without being alike.
"""

import csv
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from etude.core.errors import UserError
from etude.core.log import Log
from etude.data.picture import BadPicture, probe

SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())
SPLITS = frozenset("train training test testing val valid validation".split())
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
CAPTION_COLUMNS = ("caption", "text", "prompt", "description")
LABEL_COLUMNS = ("label", "class", "category")
SMALLEST_SIDE = 8
NEAR_BITS = 6  # hashes of twins differ in at most this many of 64 bits
NEAR_LEVELS = 8.0  # and their 16 x 16 thumbnails by less than this root mean square, of 255


@dataclass(frozen=True)
class Found:
    """A sound picture.

    Attributes:
        path: the file.
        sha256: of its bytes.
        width, height: upright pixels.
        grey: every pixel is grey.
        label: class name, "" when the folder has no classes.
        caption: "" when there is none.
        hash: 64-bit difference hash.
        thumbnail: (16, 16) uint8, grey.
    """

    path: Path
    sha256: str
    width: int
    height: int
    grey: bool
    label: str
    caption: str
    hash: int
    thumbnail: np.ndarray


@dataclass(frozen=True)
class Gathered:
    """What a folder holds.

    Attributes:
        pictures: sound pictures in the order of their sha256, without exact copies.
        bad: (path, reason) of the others.
        copies: how many exact copies were left out.
        form: "classes", "captions", or "unlabelled".
    """

    pictures: list[Found]
    bad: list[tuple[Path, str]]
    copies: int
    form: str


def gather(folder: Path, log: Log) -> Gathered:
    """Read and check every picture below `folder`.

    Raises:
        UserError: no such folder, no pictures, or a CSV table without the columns it needs.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; type: etude start FOLDER")
    paths = sorted(_pictures(folder))
    if not paths:
        kinds = ", ".join(sorted(SUFFIXES))
        raise UserError(f"{folder} holds no pictures ({kinds}); type the folder that holds them")
    table, missing = _read_tables(folder, set(paths))
    classes = _class_names(folder, paths, table)
    form = "classes" if classes else "unlabelled"
    found: list[Found] = []
    bad = list(missing)
    with log.progress("checking pictures", len(paths), "pictures") as bar:
        for path, outcome in _examine_all(paths):
            bar.advance()
            if isinstance(outcome, str):
                bad.append((path, outcome))
            elif classes and path not in classes:
                bad.append((path, "lies outside the class folders"))
            else:
                caption = table.get(path, ("", ""))[1] or _caption_beside(path)
                found.append(
                    Found(path, *outcome[:4], classes.get(path, ""), caption, *outcome[4:])
                )
    unique = {(picture.sha256, picture.label): picture for picture in reversed(found)}
    pictures = sorted(unique.values(), key=lambda p: (p.sha256, p.label))
    if any(picture.caption for picture in pictures):
        form = "captions" if form == "unlabelled" else "classes and captions"
    return Gathered(pictures, sorted(bad), len(found) - len(pictures), form)


def difference_hash(grey: Image.Image) -> int:
    """64 bits: cell (r, c) of the 9 x 8 thumbnail is darker than cell (r, c + 1), row by row."""
    cells = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(cells[:, :-1] < cells[:, 1:]).tobytes(), "big")


def groups(pictures: Sequence[Found]) -> list[list[int]]:
    """Indices of pictures in groups of near-duplicates, by union-find; each picture is in one.

    Two hashes within 6 bits agree on at least one of 7 bands of the 64 bits, so only pictures that
    share a band are compared.
    """
    parent = list(range(len(pictures)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    hashes = np.array([picture.hash for picture in pictures], np.uint64)
    thumbs = np.array([picture.thumbnail.ravel() for picture in pictures], np.float32)
    edges = np.linspace(0, 64, NEAR_BITS + 2).astype(int)
    for low, high in zip(edges, edges[1:], strict=False):
        mask = np.uint64((1 << int(high - low)) - 1)
        for members in _buckets((hashes >> np.uint64(low)) & mask):
            for place, index in enumerate(members[:-1]):
                others = members[place + 1 :]
                near = np.bitwise_count(hashes[others] ^ hashes[index]) <= NEAR_BITS
                others = others[near]
                error = np.sqrt(((thumbs[others] - thumbs[index]) ** 2).mean(axis=1))
                for other in others[error < NEAR_LEVELS]:
                    parent[root(int(other))] = root(int(index))
    together: dict[int, list[int]] = defaultdict(list)
    for index in range(len(pictures)):
        together[root(index)].append(index)
    return list(together.values())


def _buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    return (members for members in np.split(order, cuts) if len(members) > 1)


def _pictures(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            yield path


def _examine_all(paths: list[Path]) -> Iterator[tuple[Path, tuple | str]]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        yield from zip(paths, threads.map(_examine, paths), strict=True)


def _examine(path: Path) -> tuple | str:
    """(sha256, width, height, grey, hash, thumbnail) of a picture, or why it cannot be used."""
    try:
        data = path.read_bytes()
        facts = probe(data)
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except BadPicture as error:
        return str(error)
    except Exception as error:  # Pillow's format plug-ins raise many kinds on damaged files
        return f"cannot be read ({' '.join(str(error).split())[:100] or type(error).__name__})"
    if min(facts.width, facts.height) < SMALLEST_SIDE:
        return f"is {facts.width} x {facts.height} pixels; the smallest side allowed is 8"
    small = np.asarray(upright.resize((16, 16), Image.Resampling.BOX), np.int16)
    grey = upright.convert("L")
    is_grey = facts.channels in (1, 2) or bool(np.ptp(small, axis=2).max() <= 2)
    thumbnail = np.asarray(grey.resize((16, 16), Image.Resampling.BOX))
    digest = hashlib.sha256(data).hexdigest()
    return digest, facts.width, facts.height, is_grey, difference_hash(grey), thumbnail


def _caption_beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    try:
        return " ".join(text.read_text("utf-8", errors="replace").split()) if text.exists() else ""
    except OSError:
        return ""


def _class_names(
    folder: Path, paths: list[Path], table: dict[Path, tuple[str, str]]
) -> dict[Path, str]:
    """path -> class; from the table's label column, else from the first folder below the splits."""
    labelled = {path: label for path, (label, _) in table.items() if label}
    if labelled:
        return labelled
    names = {}
    for path in paths:
        parts = path.relative_to(folder).parts[:-1]
        parts = parts[1:] if parts and parts[0].lower() in SPLITS else parts
        if parts:
            names[path] = parts[0]
    return names if not table else {}


def _read_tables(
    folder: Path, known: set[Path]
) -> tuple[dict[Path, tuple[str, str]], list[tuple[Path, str]]]:
    """path -> (label, caption) from CSV files, and rows whose picture is not there."""
    table: dict[Path, tuple[str, str]] = {}
    missing = []
    for file in sorted(folder.glob("*.csv")):
        with file.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
            reader = csv.DictReader(lines)
            names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
            column = _first(FILE_COLUMNS, names)
            caption, label = _first(CAPTION_COLUMNS, names), _first(LABEL_COLUMNS, names)
            if column is None or caption is None and label is None:
                raise UserError(
                    f"{file} has the columns {', '.join(names) or '(none)'}; it needs file_name "
                    f"and caption or label"
                )
            for row in reader:
                path = folder / (row[column] or "").strip()
                if path not in known:
                    missing.append(
                        (path, f"named in {file.name}, line {reader.line_num}, not found")
                    )
                    continue
                table[path] = tuple((row[c] or "").strip() if c else "" for c in (label, caption))
    return table, missing


def _first(wanted: Sequence[str], names: dict[str, str]) -> str | None:
    return next((names[name] for name in wanted if name in names), None)
