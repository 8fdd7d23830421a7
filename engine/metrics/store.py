"""The store of features: content-addressed, resumable by shard, shared between jobs.

A folder per entry, named by the sha256 of everything that fixes its numbers: the fingerprint of the
set of pictures, the extractor's name, version and weights, its preprocessing, dtype and the number
of pictures. Shards are safetensors files written beside and renamed; `manifest.json` is written
last, after every shard has been counted and every sample key has been seen exactly once; a damaged
one counts as none, so that the entry is finished again. Two jobs with one size of batch and one
device write equal files; other batches round otherwise (evaluation/extract.py), so of two writers
of a shard the first stays. Stores that were filled apart merge file by file. Moments of a set or of
a large group of it are kept beside its features once somebody asked for them, where the folder can
be written to.
"""

import contextlib
import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from etude.core.errors import UserError
from etude.core.files import file_sha256, read_json, write_bytes_atomic, write_json_atomic

from .moments import Moments

# Age of a temporary file whose writer was killed: writing one takes seconds, so that hours later
# no job wants it, not even one that was suspended or waited for a slow disk.
_ABANDONED_S = 6 * 3600
_BLOCK = 8192  # rows that wait to be merged into moments


@dataclass(frozen=True)
class FeatureKey:
    """What an entry's numbers depend on, and nothing else."""

    pictures: str  # fingerprint of the set
    extractor: str
    version: str
    weights_sha256: str
    preprocessing: str
    dtype: str
    count: int

    def digest(self) -> str:
        """The entry's address: 64 hex digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class FeatureSet:
    """A finished entry: features (N, D) float32, sample keys, labels (N,) int64 and groups."""

    digest: str
    features: torch.Tensor
    keys: list[str]
    labels: torch.Tensor
    groups: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, index: torch.Tensor) -> "FeatureSet":
        """The rows at `index` (K,) int64, in that order.

        Raises:
            UserError: the index is a mask or no whole numbers.
        """
        if index.dtype not in (torch.int64, torch.int32):
            raise UserError(
                f"rows are chosen by int64 numbers, got {index.dtype}; a mask's are "
                "mask.nonzero()[:, 0]"
            )
        chosen = index.tolist()
        return FeatureSet(
            self.digest,
            self.features[index],
            [self.keys[i] for i in chosen],
            self.labels[index],
            [self.groups[i] for i in chosen],
        )


class FeatureStore:
    """A folder of entries; any number of jobs may read and write it at once."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def has(self, key: FeatureKey) -> bool:
        """Whether the entry is complete."""
        return _manifest(self._entry(key.digest())) is not None

    def writer(self, key: FeatureKey, shard_size: int = 1024) -> "EntryWriter":
        """Start or continue an entry; shards found whole are not asked for again."""
        return EntryWriter(self._entry(key.digest()), key, shard_size)

    def load(self, key: FeatureKey | str) -> FeatureSet:
        """Read a complete entry, by key or digest; every shard is checked against its sha256.

        Raises:
            UserError: the entry is missing, incomplete or damaged.
        """
        digest = key if isinstance(key, str) else key.digest()
        parts = list(self._shards(digest))
        return FeatureSet(
            digest,
            torch.cat([part[0] for part in parts]),
            [key for part in parts for key in part[2]["keys"]],
            torch.cat([part[1] for part in parts]),
            [group for part in parts for group in part[2]["groups"]],
        )

    def moments(self, key: FeatureKey | str, group: str | None = None) -> Moments:
        """Moments of a complete entry's rows, of one group of them where it is named.

        Computed a shard at a time at the first call, then kept beside the features.

        Raises:
            UserError: as `load`; or no row is of that group.
        """
        return self.moments_of(key, [group])[group]

    def moments_of(
        self, key: FeatureKey | str, groups: Iterable[str | None]
    ) -> dict[str | None, Moments]:
        """Moments of several groups, None being all rows, in one pass over the entry.

        Those of no more rows than dimensions are not kept: they would be larger than their rows. In
        2,048 dimensions the moments of each group take 32 MiB of memory.

        Raises:
            UserError: as `load`; or no row is of one of the groups.
        """
        digest = key if isinstance(key, str) else key.digest()
        found = {group: self._kept(digest, group) for group in groups}
        totals = {group: _Total() for group, known in found.items() if known is None}
        if not totals:
            return found
        for features, _, note in self._shards(digest):
            rows: dict[str, list[int]] = {}
            for row, group in enumerate(note["groups"]):
                rows.setdefault(group, []).append(row)
            for group, total in totals.items():
                if group is None:
                    total.add(features)
                elif group in rows:
                    total.add(features[rows[group]])
        for group, total in totals.items():
            found[group] = total.moments()
            if found[group] is None:
                raise UserError(f"the set of features {digest[:12]} has no group {group!r}")
            if group is None or found[group].count > len(found[group].mean):
                self._keep(digest, group, found[group])
        return found

    def merge(self, other: "FeatureStore") -> int:
        """Take over every shard of another store that this one lacks, then count entries anew.

        Returns:
            The number of entries that are complete afterwards and were not before.

        Raises:
            UserError: the other is no store, a shard of it is damaged, or an entry counts wrong.
        """
        entries, completed = sorted(other.folder.glob("*/*/key.json")), 0
        if not entries:
            raise UserError(
                f"{other.folder} holds no features; name a folder that was extract's --store"
            )
        for begun in entries:
            key = _read_key(begun)
            if self.has(key):
                continue
            for size, shards in _shards_by_size(begun.parent).items():
                for shard in shards:
                    self.writer(key, size).adopt(shard)
            sizes = _shards_by_size(self._entry(key.digest()))
            completed += any(self.writer(key, size).finish_if_whole() for size in sizes)
        return completed

    def _shards(self, digest: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict]]:
        """Every shard of a complete entry, checked, in order."""
        entry = self._entry(digest)
        manifest = _manifest(entry)
        if manifest is None:
            raise UserError(
                f"the feature store {self.folder} has no complete entry {digest[:12]}; "
                f"run the extract or evaluate command that makes it"
            )
        for shard in manifest["shards"]:
            yield self._checked(entry / shard["file"], shard["sha256"])

    def _kept(self, digest: str, group: str | None) -> Moments | None:
        """Moments that an earlier call kept; None where there are none, or damaged ones."""
        with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError, ValueError):
            return _read_moments(self._moments_file(digest, group))
        return None

    def _keep(self, digest: str, group: str | None, found: Moments) -> None:
        count = torch.tensor(found.count)
        tensors = {"count": count, "mean": found.mean.cpu(), "scatter": found.scatter.cpu()}
        data = save(tensors, {"sha256": _tensor_sha256(tensors)})
        with contextlib.suppress(OSError):  # of a store that can only be read: they are known now
            write_bytes_atomic(self._moments_file(digest, group), data)

    def _moments_file(self, digest: str, group: str | None) -> Path:
        # A group's name may hold anything; a file's may not.
        name = "all" if group is None else hashlib.sha256(group.encode()).hexdigest()[:32]
        return self._entry(digest) / f"moments-{name}.safetensors"

    def _entry(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest

    @staticmethod
    def _checked(path: Path, sha256: str) -> tuple[torch.Tensor, torch.Tensor, dict]:
        found = file_sha256(path) if path.exists() else "missing"
        if found != sha256:
            raise UserError(
                f"features {path} are {'missing' if found == 'missing' else 'damaged'}; delete the "
                f"folder {path.parent} and run the command again"
            )
        return _read_shard(path)


class EntryWriter:
    """Fills one entry shard by shard; a shard covers `shard_size` consecutive pictures."""

    def __init__(self, folder: Path, key: FeatureKey, shard_size: int) -> None:
        self.folder, self.key, self.shard_size = folder, key, shard_size
        if not (folder / "key.json").exists():
            with self._writing():
                write_json_atomic(folder / "key.json", asdict(key))

    def missing(self) -> list[tuple[int, int]]:
        """Ranges [start, stop) of pictures that no whole shard covers yet."""
        return [bounds for bounds in self._ranges() if not self.has(*bounds)]

    def has(self, start: int, stop: int) -> bool:
        """Whether the shard of pictures [start, stop) is there and whole."""
        return _is_whole(self._shard(start), stop - start)

    def write(
        self,
        start: int,
        features: torch.Tensor,
        keys: Sequence[str],
        labels: torch.Tensor,
        groups: Sequence[str],
    ) -> None:
        """Write the shard that begins at `start`; features (n, D) float32, labels (n,) int64.

        One that another job wrote meanwhile stays: its manifest may name it already.
        """
        stop = min(start + self.shard_size, self.key.count)
        lengths = {len(features), len(keys), len(labels), len(groups)}
        if lengths != {stop - start} or start % self.shard_size:
            raise ValueError(f"shard {start}-{stop} was given {sorted(lengths)} rows")
        if not torch.isfinite(features).all():
            bad = keys[int((~torch.isfinite(features).all(1)).nonzero()[0])]
            raise UserError(f"{self.key.extractor} features of picture {bad} are not finite")
        if self.has(start, stop):
            return
        tensors = {
            "features": features.to("cpu", torch.float32).contiguous(),
            "labels": labels.to("cpu", torch.int64).contiguous(),
        }
        about = {"keys": list(keys), "groups": list(groups), "sha256": _tensor_sha256(tensors)}
        # One entry: safetensors writes several in an order that differs from call to call.
        self._place(self._shard(start), save(tensors, {"about": json.dumps(about)}), stop - start)

    def adopt(self, shard: Path) -> None:
        """Copy a shard that another store's writer wrote, unless it is here already and whole."""
        target = self.folder / shard.name
        if _is_whole(target):
            return
        if not _is_whole(shard):
            raise UserError(f"features {shard} are damaged; extract them again")
        self._place(target, shard.read_bytes())

    def _place(self, path: Path, data: bytes, count: int | None = None) -> None:
        """Write a shard unless a whole one, of `count` rows, is there by now.

        What is there is moved aside before it is judged: another writer may mend it at any moment,
        and its manifest then names what it wrote.
        """
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        with self._writing():
            with contextlib.suppress(FileNotFoundError):
                path.rename(aside)
                if _is_whole(aside, count):
                    data = aside.read_bytes()
            try:
                write_bytes_atomic(path, data, keep=True)
            finally:
                aside.unlink(missing_ok=True)

    def finish_if_whole(self) -> bool:
        """Finish the entry if no shard is missing; whether it did."""
        if self.missing():
            return False
        self.finish()
        return True

    def finish(self) -> None:
        """Count the shards and keys, then write the manifest that makes the entry complete."""
        shards, keys = [], []
        for start, stop in self._ranges():
            path = self._shard(start)
            rows = _read_shard(path)[2]["keys"]
            if len(rows) != stop - start:
                raise UserError(f"features {path} hold {len(rows)} rows, expected {stop - start}")
            keys += rows
            shards.append({"file": path.name, "sha256": file_sha256(path), "count": len(rows)})
        if len(keys) != self.key.count:
            raise UserError(f"{self.folder} holds {len(keys)} pictures, expected {self.key.count}")
        check_keys(keys)
        samples = hashlib.sha256("\n".join(keys).encode()).hexdigest()
        manifest = {"key": asdict(self.key), "shards": shards, "samples_sha256": samples}
        with self._writing():
            write_json_atomic(self.folder / "manifest.json", manifest)
        with contextlib.suppress(OSError):  # what killed writers left, by the disk's own clock
            now = (self.folder / "manifest.json").stat().st_mtime
            for path in self.folder.glob(".*.tmp"):
                if now - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say in one sentence what keeps the block from writing."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the feature store {self.folder.parent.parent} cannot be written to ("
                f"{error.strerror or error}); make room there or name another: "
                "store=FOLDER in a recipe, --store FOLDER with --extractors"
            ) from None

    def _ranges(self) -> list[tuple[int, int]]:
        starts = range(0, self.key.count, self.shard_size)
        return [(start, min(start + self.shard_size, self.key.count)) for start in starts]

    def _shard(self, start: int) -> Path:
        return self.folder / f"{start:09d}-{self.shard_size}.safetensors"


def check_keys(keys: Sequence[str]) -> None:
    """Raise `UserError` where a sample key is there twice."""
    twice = next((key for key, times in Counter(keys).items() if times > 1), None)
    if twice is not None:
        raise UserError(f"picture {twice} is in the set twice; every sample key must be unique")


def _manifest(entry: Path) -> dict | None:
    """What names a complete entry's shards; None where it is not there, or damaged."""
    try:
        found = json.loads((entry / "manifest.json").read_text())
        names = [(shard["file"], shard["sha256"]) for shard in found["shards"]]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return found if names else None


def _read_key(path: Path) -> FeatureKey:
    """The key of an entry that was begun; `UserError` where its fields are others."""
    found, known = read_json(path), {field.name for field in fields(FeatureKey)}
    if not isinstance(found, dict) or set(found) != known:
        odd = ", ".join(sorted(set(found) ^ known)) if isinstance(found, dict) else "no fields"
        raise UserError(
            f"{path} is not a key of this version ({odd}); extract its pictures again, or merge "
            "with the version of Etude that wrote it"
        )
    return FeatureKey(**found)


class _Total:
    """Moments of rows that come in parts, merged in blocks: a merge costs D^2 however few come."""

    def __init__(self) -> None:
        self._merged: Moments | None = None
        self._rows: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        self._rows.append(rows)
        if sum(map(len, self._rows)) >= _BLOCK:
            self._merge()

    def moments(self) -> Moments | None:
        """Of all rows; None where there were none."""
        if self._rows:
            self._merge()
        return self._merged

    def _merge(self) -> None:
        part, self._rows = Moments.of(torch.cat(self._rows)), []
        self._merged = part if self._merged is None else self._merged.merge(part)


def _read_shard(path: Path) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Features, labels and {"keys", "groups"}; ValueError where the bytes are not those written."""
    with safe_open(path, "pt") as file:
        note = file.metadata()
        tensors = {name: file.get_tensor(name) for name in ("features", "labels")}
    about = json.loads(note["about"] if "about" in note else note["samples"])  # as once written
    if _tensor_sha256(tensors) != about.get("sha256", note.get("sha256")):
        raise ValueError(f"{path} is damaged")
    return tensors["features"], tensors["labels"], about


def _is_whole(path: Path, count: int | None = None) -> bool:
    """Whether a shard is there, as it was written, and of so many rows."""
    try:
        found = len(_read_shard(path)[2]["keys"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return False
    return count is None or found == count


def _shards_by_size(entry: Path) -> dict[int, list[Path]]:
    """An entry's shards in order, by the number of pictures that they were cut to."""
    found: dict[int, list[Path]] = {}
    for path in sorted(entry.glob("*.safetensors")):
        size = path.stem.partition("-")[2]
        if size.isdigit():  # else moments, which are computed again
            found.setdefault(int(size), []).append(path)
    return found


def _read_moments(path: Path) -> Moments:
    """Moments that were kept; ValueError where the bytes are not those written."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("count", "mean", "scatter")}
        if _tensor_sha256(tensors) != file.metadata()["sha256"]:
            raise ValueError(f"{path} is damaged")
    return Moments(int(tensors["count"]), tensors["mean"], tensors["scatter"])


def _tensor_sha256(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].numpy().tobytes())
    return total.hexdigest()
