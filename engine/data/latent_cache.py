"""The files of a latent cache; called by latents.py alone.

One safetensors file per shard of pictures: mean and std (n, variants, c, h, w), the crop and flip
of each variant (n, variants), labels, valid and scalars (n,), keys and captions in the header.
`cache.json` is written last and lists them; `plan.json` stands in for it until then.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from etude.core.errors import UserError
from etude.core.files import file_sha256, write_bytes_atomic

from .augment import Geometry
from .index import SCALAR
from .shards import ShardSet

DONE, PLAN = "cache.json", "plan.json"
GEOMETRY = tuple(Geometry.__dataclass_fields__)
_TYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "|u1"}
_AGAIN = "delete its folder to encode the latents again"


def keyed(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan with the sha256 over all of it under "key"."""
    text = json.dumps(plan, sort_keys=True)
    return plan | {"key": hashlib.sha256(text.encode()).hexdigest()}


def compare(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses a cache whose key differs, naming both keys and the fields that differ."""
    if found.get("key") == wanted["key"]:
        return
    names = [name for name in wanted if name != "key" and found.get(name) != wanted[name]]
    differs = ", ".join(f"{name} {found.get(name)} instead of {wanted[name]}" for name in names)
    raise UserError(
        f"{folder} holds latents with key {str(found.get('key'))[:12]} but this run needs"
        f" {wanted['key'][:12]} ({differs}); name another folder or delete it to encode again"
    )


def file_of(folder: Path, shard: int) -> Path:
    """The file of one shard."""
    return folder / f"latents-{shard:06d}.safetensors"


def is_written(path: Path, key: str) -> bool:
    """Whether a shard's file is there and belongs to this key."""
    return path.is_file() and _header(path)[1].get("key") == key


def begin(folder: Path, plan: dict[str, Any]) -> bool:
    """Prepares the folder; True when the cache is already complete."""
    for name in (DONE, PLAN):
        if (folder / name).is_file():
            compare(folder, _read_json(folder / name).get("plan", {}), plan)
    if (folder / DONE).is_file():
        return True
    write_bytes_atomic(folder / PLAN, json.dumps({"plan": plan}, indent=1).encode())
    return False


def write_shard(
    path: Path, tensors: dict[str, np.ndarray], key: str, data: ShardSet, indices: np.ndarray
) -> None:
    """Writes one shard's file, whole or not at all."""
    from safetensors.numpy import save

    samples = [data.described(int(index)) for index in indices]
    labels = np.array([label for _, label, _ in samples], dtype=np.int64)
    scalars = {
        SCALAR + name: data.scalar(name, indices).astype(np.float32) for name in data.scalars
    }
    words = {"keys": [k for k, _, _ in samples], "captions": [c for _, _, c in samples]}
    # One entry, because safetensors writes several in no fixed order: equal caches, equal bytes.
    metadata = {"etude": json.dumps({"key": key} | words)}
    write_bytes_atomic(path, save(tensors | {"labels": labels} | scalars, metadata))


def publish(folder: Path, plan: dict[str, Any], data: ShardSet) -> None:
    """Writes cache.json when every shard's file is there."""
    paths = [file_of(folder, shard) for shard in range(len(data.shard_sizes))]
    if not all(is_written(path, plan["key"]) for path in paths):
        return
    entries = [
        {"name": path.name, "sha256": file_sha256(path), "size": path.stat().st_size, "count": n}
        for path, n in zip(paths, data.shard_sizes, strict=True)
    ]
    content = {"plan": plan, "shards": entries, "classes": data.classes}
    content["digest"] = _digest(content)
    write_bytes_atomic(folder / DONE, json.dumps(content, indent=1).encode())
    (folder / PLAN).unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked content of cache.json: "plan", "shards", "classes"."""
    if not (folder / DONE).is_file():
        raise UserError(f"{folder} holds no complete latents; encode them first")
    content = _read_json(folder / DONE)
    if content.get("digest") != _digest(content):
        raise UserError(f"{folder / DONE} is damaged; {_AGAIN}")
    return content


def open_shard(
    folder: Path, entry: dict[str, Any], plan: dict[str, Any], verify: bool
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Memory-mapped arrays by name, and the keys and captions, of one shard's file."""
    path = folder / entry["name"]
    if not path.is_file() or path.stat().st_size != entry["size"]:
        raise UserError(f"{path} is missing or truncated; {_AGAIN}")
    if verify and file_sha256(path) != entry["sha256"]:
        raise UserError(f"{path} is damaged (sha256); {_AGAIN}")
    header, metadata, start = _header(path)
    if metadata.get("key") != plan["key"]:
        raise UserError(f"{path} is damaged or belongs to other latents; {_AGAIN}")
    try:
        arrays = {name: _map(path, info, start) for name, info in header.items()}
        words = {name: metadata[name] for name in ("keys", "captions")}
        lengths = {len(values) for values in (*arrays.values(), *words.values())}
        scalars = {SCALAR + name for name in plan.get("scalars", [])}
        complete = {"mean", "std", "valid", "labels", *GEOMETRY, *scalars} <= arrays.keys()
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError):
        lengths, complete = set(), False
    if not complete or lengths != {entry["count"]}:
        raise UserError(f"{path} is damaged; {_AGAIN}")
    return arrays, words


def _map(path: Path, info: dict[str, Any], start: int) -> np.ndarray:
    offset, shape = start + info["data_offsets"][0], tuple(info["shape"])
    return np.memmap(path, _TYPES[info["dtype"]], "r", offset, shape)


def _header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Tensors, metadata and start of the data of a safetensors file; empty when damaged."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                return {}, {}, 0
            header = json.loads(file.read(length))
        metadata = json.loads(header.pop("__metadata__")["etude"])
        return (header, metadata, 8 + length) if isinstance(metadata, dict) else ({}, {}, 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, {}, 0


def _digest(content: dict[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged; {_AGAIN}")
    return content
