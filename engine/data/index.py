"""Where each sample lies inside its tar: built once, checked at every opening; called by shards.

Beside the tars stand `index.json` (names, sizes, hashes) and one `<shard>.offsets.npy` per tar. A
sample is the run of neighbouring members that share a name up to its first dot, as in WebDataset:
one picture, an optional `.cls` (an integer), `.txt` (a caption) and `.json` (`label`, `caption`,
and numbers by name, such as an aesthetic score, which a model can be asked by). The files are
written atomically and depend on the tars alone, so ranks may build them at once.
"""

import hashlib
import io
import json
import math
import re
import tarfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from etude.core.config import Config
from etude.core.errors import UserError
from etude.core.files import file_sha256, write_bytes_atomic

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"})
NAME = "index.json"
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_BLOCK = 512
_LARGEST = float(np.finfo(np.float32).max)
SCALAR = "scalar:"  # a column of numbers from the samples' .json
_NO_TEXT, _PLAIN_TEXT, _JSON_TEXT = 0, 1, 2


class ShardEntry(Config):
    """One tar: its name, its bytes, its samples, and the hash of its offsets file."""

    name: str
    size: int
    sha256: str
    head: int  # CRC-32 of the first 512 bytes
    count: int
    offsets_sha256: str

    @property
    def offsets(self) -> str:
        return f"{self.name}.offsets.npy"


class Index(Config):
    """The content of index.json; `digest` covers every other field."""

    format: Literal["etude-shards-1"] = "etude-shards-1"
    classes: list[str]
    labelled: bool
    captioned: bool
    shard_in_key: bool  # keys repeat across shards, so a sample's key is shard/key
    shards: list[ShardEntry]
    # The numbers that every sample's .json holds; None: indexed before anybody looked for them.
    scalars: list[str] | None = None
    digest: str = ""

    def computed_digest(self) -> str:
        """sha256 over all fields but `digest`; without `scalars` where nobody looked for them."""
        left_out = {"digest", "scalars"} if self.scalars is None else {"digest"}
        text = json.dumps(self.model_dump(exclude=left_out), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def content(self) -> str:
        """sha256 over what is stored, the same wherever and in whatever order it was indexed."""
        parts = [self.classes, sorted((s.name, s.sha256) for s in self.shards)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_index(folder: Path, index_folder: Path) -> Index:
    """The index of a folder of shards, after the checks that need no more than file sizes, the
    first header of each tar and the offsets files.

    Raises:
        UserError: the index is damaged, belongs to other shards, or a shard was cut or replaced.
    """
    path = index_folder / NAME
    again = f"delete {path} to index the folder anew"
    try:
        index = Index.model_validate_json(path.read_bytes(), strict=True)
    except (ValidationError, ValueError):
        raise UserError(f"{path} is not a readable shard index; {again}") from None
    if index.digest != index.computed_digest():
        raise UserError(f"{path} is damaged (its digest does not match); {again}")
    for shard in index.shards:
        if Path(shard.name).name != shard.name or shard.name in ("", ".", ".."):
            raise UserError(f"{path} names the shard {shard.name!r}, a path outside the folder")
        _check_shard(folder / shard.name, shard, again)
        offsets = index_folder / shard.offsets
        if not offsets.is_file() or file_sha256(offsets) != shard.offsets_sha256:
            raise UserError(f"{offsets} is missing or damaged; {again}")
    extra = sorted({p.name for p in folder.glob("*.tar")} - {s.name for s in index.shards})
    if extra:
        raise UserError(f"{folder / extra[0]} is not in {path}; {again}")
    return index


def _check_shard(path: Path, shard: ShardEntry, again: str) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing though the index lists it; restore it or {again}")
    size = path.stat().st_size
    if size != shard.size:
        kind = "truncated" if size < shard.size else "not the indexed file"
        raise UserError(
            f"{path} is {kind}: it has {size} bytes where the index says {shard.size};"
            f" copy the shard again, or if it is right {again}"
        )
    with open(path, "rb") as file:
        if zlib.crc32(file.read(_BLOCK)) != shard.head:
            raise UserError(f"{path} is not the indexed file (its first header differs); {again}")


def build_index(folder: Path, index_folder: Path) -> Index:
    """Reads every tar of `folder` once and writes the index into `index_folder`, atomically."""
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(
            f"{folder} holds no .tar shards; name a folder of WebDataset tars"
            " or make one with: etude start FOLDER"
        )
    tables = [scan_shard(path) for path in paths]
    fields = _common_fields(paths, tables)
    classes = _read_classes(folder)
    for path, table in zip(paths, tables, strict=True):
        _check_labels(path, table, classes)
    keys = [key for table in tables for key in table["key"].tolist()]
    scalars = set.intersection(*(set(_scalars(table)) for table in tables))
    entries = []
    try:
        index_folder.mkdir(parents=True, exist_ok=True)
        for path, table in zip(paths, tables, strict=True):
            offsets = index_folder / f"{path.name}.offsets.npy"
            write_bytes_atomic(offsets, _npy(table))
            head = zlib.crc32(path.open("rb").read(_BLOCK))
            entry = ShardEntry(
                name=path.name,
                size=path.stat().st_size,
                sha256=file_sha256(path),
                head=head,
                count=len(table),
                offsets_sha256=file_sha256(offsets),
            )
            entries.append(entry)
        index = Index(
            classes=classes,
            labelled=fields[0],
            captioned=fields[1],
            shard_in_key=len(set(keys)) != len(keys),
            shards=entries,
            scalars=sorted(scalars),
        )
        index = index.model_copy(update={"digest": index.computed_digest()})
        write_bytes_atomic(index_folder / NAME, index.model_dump_json(indent=1).encode())
    except OSError as error:
        raise UserError(
            f"the index of {folder} cannot be written ({error}); make {index_folder} writable"
            " or name another place: data.index_folder=FOLDER"
        ) from None
    return index


def _npy(table: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    return buffer.getvalue()


def _read_classes(folder: Path) -> list[str]:
    path = folder / "classes.txt"
    if not path.is_file():
        return []
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; write one class name per line") from None
    return [line.strip() for line in lines if line.strip()]


def _common_fields(paths: list[Path], tables: list[np.ndarray]) -> tuple[bool, bool]:
    """Whether samples have labels and captions; all of them have, or none has."""
    found = []
    for name, has in (("label", lambda t: t["label"] >= 0), ("caption", lambda t: t["text"] > 0)):
        presence = np.concatenate([has(table) for table in tables])
        if presence.any() and not presence.all():
            ends = np.cumsum([len(table) for table in tables])
            number = int(np.argmin(presence))
            shard = int(np.searchsorted(ends, number, side="right"))
            path, table = paths[shard], tables[shard]
            key = table["key"][number - ends[shard]].decode()
            raise UserError(
                f"{path}: sample {key} has no {name} though other samples have one;"
                f" add its {'.cls' if name == 'label' else '.txt'} member or remove the others"
            )
        found.append(bool(presence.all()))
    return found[0], found[1]


def _check_labels(path: Path, table: np.ndarray, classes: list[str]) -> None:
    if classes and len(table) and table["label"].max() >= len(classes):
        row = table[int(table["label"].argmax())]
        raise UserError(
            f"{path}: sample {row['key'].decode()} has label {row['label']} but classes.txt names"
            f" {len(classes)} classes; labels count from 0"
        )


def scan_shard(path: Path) -> np.ndarray:
    """The samples of one tar as a table, in stored order.

    Columns: key, extension (bytes), image_offset, image_size, text_offset, text_size (bytes from
    the start of the file), text (0 none, 1 plain, 2 JSON), label (-1 none), crc (CRC-32 of the
    picture followed by the text), and a float64 column "scalar:NAME" for each number that the
    .json of every sample holds under an ASCII NAME.

    Raises:
        UserError: naming the shard and member of whatever is wrong with the archive.
    """
    size = path.stat().st_size
    members, end = [], 0
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                _check_member(path, member, size)
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.isreg():
                    members.append((member.name, member.offset_data, member.size))
    except UserError:
        raise
    except Exception as error:  # tarfile lets many kinds through on damaged archives
        reason = " ".join(str(error).split())
        kind = "is empty" if size == 0 else f"is not a readable tar ({reason})"
        raise UserError(f"{path} {kind}; shards are uncompressed tar files") from None
    with open(path, "rb") as file:
        _check_end(path, file, end)
        return _table(path, file, _samples(path, members))


def _check_member(path: Path, member: tarfile.TarInfo, size: int) -> None:
    name = member.name
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise UserError(f"{path}: member {name!r} points outside the archive; remove it")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise UserError(f"{path}: member {name!r} is a link or a device; store plain files")
    if member.offset_data + member.size > size:
        raise UserError(f"{path} is truncated inside member {name!r}; copy the shard again")


def _check_end(path: Path, file, end: int) -> None:
    """After the last member a tar has two zero blocks and nothing else."""
    file.seek(end)
    rest = file.read()
    if rest.strip(b"\0"):
        raise UserError(
            f"{path} has a damaged header or a second archive at byte {end};"
            " copy the shard again, and do not join tars with cat"
        )
    if len(rest) < 2 * _BLOCK:
        raise UserError(f"{path} is truncated: its end mark is missing; copy the shard again")


def _samples(path: Path, members: list[tuple[str, int, int]]) -> dict[str, dict]:
    samples: dict[str, dict] = {}
    current = None
    for name, offset, size in members:
        match = _KEY.fullmatch(name.removeprefix("./"))
        if match is None:
            continue
        key, extension = match[1], match[2].lower()
        if key != current and key in samples or extension in samples.get(key, ()):
            raise UserError(f"{path}: member {name!r} repeats the key {key!r}; keys must be unique")
        samples.setdefault(key, {})[extension] = (offset, size)
        current = key
    if not samples:
        raise UserError(f"{path} holds no samples; members are named KEY.jpg, KEY.cls, KEY.txt")
    return samples


def _table(path: Path, file, samples: dict[str, dict]) -> np.ndarray:
    rows, scalars = [], []
    for key, fields in samples.items():
        pictures = sorted(PICTURES & fields.keys())
        if len(pictures) != 1:
            what = "no picture" if not pictures else f"several pictures ({', '.join(pictures)})"
            raise UserError(f"{path}: sample {key} has {what}; it needs one, such as {key}.jpg")
        row = {"key": key.encode(), "extension": pictures[0].encode(), "label": -1}
        row["image_offset"], row["image_size"] = fields[pictures[0]]
        row |= {"text_offset": 0, "text_size": 0, "text": _NO_TEXT}
        scalars.append(_read_json(path, key, file, fields, row))
        if "txt" in fields:
            row["text_offset"], row["text_size"] = fields["txt"]
            row["text"] = _PLAIN_TEXT
            caption_of(_read(file, fields["txt"]), _PLAIN_TEXT, f"{path}: member {key}.txt")
        if "cls" in fields:
            row["label"] = _label(f"{path}: member {key}.cls", _read(file, fields["cls"]))
        row["crc"] = zlib.crc32(
            _read(file, (row["text_offset"], row["text_size"])),
            zlib.crc32(_read(file, fields[pictures[0]])),
        )
        rows.append(row)
    longest = {name: max(len(row[name]) for row in rows) for name in ("key", "extension")}
    numbers = ["image_offset", "image_size", "text_offset", "text_size", "label"]
    kinds = [(name, f"S{length}") for name, length in longest.items()]
    kinds += [(name, "<i8") for name in numbers] + [("text", "<u4"), ("crc", "<u4")]
    for name in sorted(set.intersection(*(set(found) for found in scalars))):
        kinds.append((SCALAR + name, "<f8"))
        for row, found in zip(rows, scalars, strict=True):
            row[SCALAR + name] = found[name]
    names = [name for name, _ in kinds]
    return np.array([tuple(row[name] for name in names) for row in rows], dtype=kinds)


def _scalars(table: np.ndarray) -> list[str]:
    """Names of a table's scalars."""
    columns = table.dtype.names or ()
    return [name.removeprefix(SCALAR) for name in columns if name.startswith(SCALAR)]


def _read(file, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _read_json(path: Path, key: str, file, fields: dict, row: dict) -> dict[str, float]:
    """Fills label and caption of a row; the numbers that its .json holds by name."""
    if "json" not in fields:
        return {}
    where = f"{path}: member {key}.json"
    try:
        content = json.loads(_read(file, fields["json"]))
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not JSON; write it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{where} is not a JSON object with fields such as label and caption")
    if "label" in content and "cls" not in fields:
        row["label"] = _label(where, json.dumps(content["label"]).encode())
    if "caption" in content:
        row["text_offset"], row["text_size"] = fields["json"]
        row["text"] = _JSON_TEXT
        caption_of(_read(file, fields["json"]), _JSON_TEXT, where)
    return {name: float(value) for name, value in content.items() if _is_scalar(name, value)}


def _is_scalar(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or name == "label":
        return False
    return name.isascii() and name.isprintable() and abs(value) < _LARGEST and math.isfinite(value)


def _label(where: str, text: bytes) -> int:
    word = text.strip()
    if not re.fullmatch(rb"[0-9]{1,9}", word):
        raise UserError(f"{where} should hold a class number from 0, not {word[:20]!r}")
    return int(word)


def caption_of(data: bytes, text: int, where: str) -> str:
    """The caption in a `.txt` or `.json` member."""
    try:
        caption = json.loads(data)["caption"] if text == _JSON_TEXT else data.decode("utf-8")
    except (ValueError, KeyError):
        raise UserError(f"{where} is not UTF-8 text; write it again") from None
    if not isinstance(caption, str):
        raise UserError(f"{where} should hold text under caption")
    return caption.strip()
