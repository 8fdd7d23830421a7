"""The store of features: content-addressed, resumable by shard, shared between jobs.

A folder per entry, named by the sha256 of everything that fixes its numbers: the fingerprint of the
set of pictures, the extractor's name, version and weights, its preprocessing, dtype and the number
of pictures. Shards are safetensors files written beside and renamed; `manifest.json` is written
last, after every shard has been counted and every sample key has been seen exactly once. Two jobs
that write the same entry write equal files, so either may win. evaluation/extract.py fills it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from etude.core.errors import UserError
from etude.core.files import file_sha256, write_bytes_atomic, write_json_atomic


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
        """The rows at `index` (K,) int64, in that order."""
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
        return (self._entry(key.digest()) / "manifest.json").exists()

    def writer(self, key: FeatureKey, shard_size: int = 1024) -> "EntryWriter":
        """Start or continue an entry; shards found whole are not asked for again."""
        return EntryWriter(self._entry(key.digest()), key, shard_size)

    def load(self, key: FeatureKey | str) -> FeatureSet:
        """Read a complete entry, by key or digest; every shard is checked against its sha256.

        Raises:
            UserError: the entry is missing, incomplete or damaged.
        """
        digest = key if isinstance(key, str) else key.digest()
        entry = self._entry(digest)
        try:
            manifest = json.loads((entry / "manifest.json").read_text())
        except FileNotFoundError:
            raise UserError(
                f"the feature store {self.folder} has no complete entry {digest[:12]}; "
                f"run the extract or evaluate command that makes it"
            ) from None
        parts = [self._checked(entry / s["file"], s["sha256"]) for s in manifest["shards"]]
        return FeatureSet(
            digest,
            torch.cat([part[0] for part in parts]),
            [key for part in parts for key in part[2]["keys"]],
            torch.cat([part[1] for part in parts]),
            [group for part in parts for group in part[2]["groups"]],
        )

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
        folder.mkdir(parents=True, exist_ok=True)

    def missing(self) -> list[tuple[int, int]]:
        """Ranges [start, stop) of pictures that no whole shard covers yet."""
        return [bounds for bounds in self._ranges() if not self._whole(*bounds)]

    def write(
        self,
        start: int,
        features: torch.Tensor,
        keys: Sequence[str],
        labels: torch.Tensor,
        groups: Sequence[str],
    ) -> None:
        """Write the shard that begins at `start`; features (n, D) float32, labels (n,) int64."""
        stop = min(start + self.shard_size, self.key.count)
        lengths = {len(features), len(keys), len(labels), len(groups)}
        if lengths != {stop - start} or start % self.shard_size:
            raise ValueError(f"shard {start}-{stop} was given {sorted(lengths)} rows")
        if not torch.isfinite(features).all():
            bad = keys[int((~torch.isfinite(features).all(1)).nonzero()[0])]
            raise UserError(f"{self.key.extractor} features of picture {bad} are not finite")
        tensors = {
            "features": features.to("cpu", torch.float32).contiguous(),
            "labels": labels.to("cpu", torch.int64).contiguous(),
        }
        text = {"keys": list(keys), "groups": list(groups)}
        note = {"samples": json.dumps(text), "sha256": _tensor_sha256(tensors)}
        write_bytes_atomic(self._shard(start), save(tensors, note))

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
        if len(set(keys)) != len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"picture {twice} is in the set twice; every sample key must be unique")
        samples = hashlib.sha256("\n".join(keys).encode()).hexdigest()
        manifest = {"key": asdict(self.key), "shards": shards, "samples_sha256": samples}
        write_json_atomic(self.folder / "manifest.json", manifest)

    def _ranges(self) -> list[tuple[int, int]]:
        starts = range(0, self.key.count, self.shard_size)
        return [(start, min(start + self.shard_size, self.key.count)) for start in starts]

    def _shard(self, start: int) -> Path:
        return self.folder / f"{start:09d}-{self.shard_size}.safetensors"

    def _whole(self, start: int, stop: int) -> bool:
        try:
            return len(_read_shard(self._shard(start))[2]["keys"]) == stop - start
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return False


def _read_shard(path: Path) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Features, labels and {"keys", "groups"}; ValueError where the bytes are not those written."""
    with safe_open(path, "pt") as file:
        note = file.metadata()
        tensors = {name: file.get_tensor(name) for name in ("features", "labels")}
    if _tensor_sha256(tensors) != note["sha256"]:
        raise ValueError(f"{path} is damaged")
    return tensors["features"], tensors["labels"], json.loads(note["samples"])


def _tensor_sha256(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].numpy().tobytes())
    return total.hexdigest()
