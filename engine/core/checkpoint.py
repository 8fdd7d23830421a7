"""Checkpoints by parameter name: any world size and ZeRO stage loads any other's.

Written by the loop, read by resume, sampling and export. A checkpoint is a folder
`step-<images_seen>` with one safetensors file per rank, holding that rank's own ranges under the
key "name|state|start", and `manifest.json`, written last. The folder is built under a hidden name,
every file is fsynced, and one rename publishes it, so a kill at any moment leaves either nothing
or a complete checkpoint. Retention and reading are in `checkpoint_read.py`.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint_read import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    fingerprint_of,
    latest_checkpoint,
    read_weights,
    step_of,
    verify_checkpoint,
)
from .config import Config, option
from .distributed import World, exchange
from .errors import UserError
from .strategy import Fragment, Strategy

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 16 << 20  # bytes hashed and written at a time


class CheckpointConfig(Config):
    """When to save and what to keep."""

    every_images: int = option(
        100_000, "distance between checkpoints", unit="images", gt=0, affects_result=False
    )
    keep_last: int = option(2, "newest checkpoints kept", ge=1, affects_result=False)
    keep_every_images: int = option(
        0,
        "also keep the first checkpoint of every such span; 0 keeps none",
        unit="images",
        ge=0,
        affects_result=False,
    )
    keep_best: bool = option(
        False, "also keep the checkpoint with the best evaluation", affects_result=False
    )


class DiskNeed(NamedTuple):
    """Bytes of one checkpoint, bytes on disk while saving with retention, and a sentence."""

    one: int
    peak: int
    sentence: str


class SaveCost(NamedTuple):
    """What saving costs each rank."""

    bytes_per_rank: int
    seconds: float
    peak_host_bytes: int


def save_checkpoint(
    folder: Path, images_seen: int, strategy: Strategy, extra: dict[str, Any], world: World
) -> Path:
    """Save all state as `folder/step-<images_seen>`; all ranks call it together.

    Args:
        folder: the run's `checkpoints` folder, seen by every rank.
        extra: JSON-able facts to get back from `load_checkpoint`.

    Returns:
        The published folder. An older checkpoint of the same `images_seen` is replaced.

    Raises:
        UserError: there is not enough free space.
    """
    folder = Path(folder)
    final, building = folder / f"step-{images_seen:012d}", folder / f".step-{images_seen:012d}.tmp"
    need = sum(exchange(world, "checkpoint/bytes", _own_bytes(strategy)))

    def prepare() -> None:
        if world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _tidy(folder)
            _check_space(folder, need)
            building.mkdir()

    def write() -> dict[str, Any]:
        name = f"rank-{world.rank}of{world.size}.safetensors"
        return write_safetensors(building / name, strategy)

    def publish() -> None:
        if world.rank == 0:
            manifest = _manifest(images_seen, strategy, extra, world, files)
            write_durably(building / MANIFEST, json.dumps(manifest).encode())
            fsync_folder(building)
            _publish(building, final)

    _together(world, "prepare", prepare)
    files = _together(world, "write", write)
    _together(world, "publish", publish)
    return final


def _together(world: World, what: str, act: Callable[[], Any]) -> list[Any]:
    """Every rank acts; when one fails, all raise its error instead of waiting for it."""
    value, error = None, ""
    try:
        value = act()
    except (OSError, UserError) as problem:
        error = str(problem)
    results = exchange(world, f"checkpoint/{what}", [value, error])
    for rank, (_, error) in enumerate(results):
        if error:
            raise UserError(f"saving failed at {what} on rank {rank}: {error}")
    return [value for value, _ in results]


def _own_bytes(strategy: Strategy) -> int:
    return sum(f.data.numel() * f.data.element_size() for f in strategy.fragments())


def _check_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need * 1.02 + (1 << 20):
        raise UserError(
            f"a checkpoint needs {need / 1e9:.2f} GB but {folder} has {free / 1e9:.2f} GB free; "
            "free space there, or lower checkpoint.keep_last"
        )


def write_safetensors(path: Path, strategy: Strategy) -> dict[str, Any]:
    """Stream this rank's fragments to a file; at most one fragment is in host memory at a time.

    Returns:
        The file's entry of the manifest: name, size, sha256, and the tensors in it.
    """
    header: dict[str, Any] = {}
    entries = []
    offset = 0
    for fragment in strategy.fragments():
        key = f"{fragment.name}|{fragment.state}|{fragment.start}"
        size = fragment.data.numel() * fragment.data.element_size()
        dtype = _DTYPES[fragment.data.dtype]
        length = fragment.data.numel()
        header[key] = {"dtype": dtype, "shape": [length], "data_offsets": [offset, offset + size]}
        entries.append(_entry(fragment, dtype, key))
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        write_bytes(file, struct.pack("<Q", len(text)) + text, digest)
        for fragment in strategy.fragments():
            write_bytes(file, _bytes(fragment.data), digest)
        fsync_file(file)
    size = 8 + len(text) + offset
    return {"file": path.name, "size": size, "sha256": digest.hexdigest(), "tensors": entries}


def _entry(fragment: Fragment, dtype: str, key: str) -> list[Any]:
    length = fragment.data.numel()
    shape = list(fragment.shape)
    return [fragment.name, fragment.state, dtype, shape, key, fragment.start, length]


def _bytes(data: Tensor) -> memoryview:
    flat = data.detach().to("cpu").contiguous()
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _manifest(
    images_seen: int, strategy: Strategy, extra: dict[str, Any], world: World, files: list[dict]
) -> dict[str, Any]:
    tensors: dict[tuple[str, str], dict[str, Any]] = {}
    for file in files:
        for name, state, dtype, shape, key, start, length in file.pop("tensors"):
            fresh = {"name": name, "state": state, "dtype": dtype, "shape": shape, "parts": []}
            entry = tensors.setdefault((name, state), fresh)
            entry["parts"].append([file["file"], key, start, length])
    body = {
        "format": FORMAT,
        "images_seen": images_seen,
        "world_size": world.size,
        "profiles": getattr(strategy, "profile_states", {}),
        "aliases": getattr(strategy, "aliases", {}),
        "extra": extra,
        "files": files,
        "tensors": list(tensors.values()),
    }
    return body | {"sha256": fingerprint_of(body)}


def write_bytes(file: Any, data: bytes | memoryview, digest: Any = None) -> None:
    """Write in chunks, hashing on the way."""
    view = memoryview(data)
    for first in range(0, len(view), _CHUNK):
        chunk = view[first : first + _CHUNK]
        write_chunk(file, chunk)
        if digest is not None:
            digest.update(chunk)


def write_chunk(file: Any, chunk: memoryview) -> None:
    """The one place where bytes leave for the disk."""
    file.write(chunk)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file and wait until the disk has it."""
    with open(path, "wb") as file:
        write_bytes(file, data)
        fsync_file(file)


def fsync_file(file: Any) -> None:
    """Wait until the disk has the file's contents."""
    file.flush()
    os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(building: Path, final: Path) -> None:
    """Rename into place; an older checkpoint of that name steps aside and is removed after."""
    aside = final.with_name(f".replaced-{final.name}")
    if final.exists():
        os.rename(final, aside)
    os.rename(building, final)
    fsync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Remove what an interrupted save or removal left; bring back what it had set aside."""
    for aside in folder.glob(".replaced-step-*"):
        final = folder / aside.name.removeprefix(".replaced-")
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, final)
    for left in [*folder.glob(".step-*.tmp"), *folder.glob(".removed-step-*")]:
        shutil.rmtree(left, ignore_errors=True)


def load_checkpoint(path: Path, strategy: Strategy, verify: bool = True) -> dict[str, Any]:
    """Fill a strategy from a checkpoint of any world size and stage; all ranks call it together.

    Args:
        verify: compare every file's sha256 (each rank checks its share); sizes always are.

    Returns:
        The `extra` that was saved, and "images_seen".

    Raises:
        UserError: the checkpoint is damaged, or belongs to another model (with the differences).
    """
    world = strategy.world
    checkpoint, problem = None, ""
    try:
        checkpoint = verify_checkpoint(Path(path), verify, world.rank, world.size)
        checkpoint.check_fits(strategy.inventory())
    except UserError as error:
        problem = str(error)
    problems = [p for p in exchange(world, "checkpoint/verdict", problem) if p]
    if problems:
        raise UserError(problems[0])
    with checkpoint:
        strategy.load_fragments(checkpoint)
    return dict(checkpoint.manifest["extra"]) | {"images_seen": checkpoint.images_seen}


def prune_checkpoints(
    folder: Path, config: CheckpointConfig, best: int | None = None
) -> list[Path]:
    """Remove what retention does not keep; rank 0 calls it after a save.

    Args:
        best: images_seen of the best checkpoint so far, kept with `keep_best`.

    Returns:
        The removed folders. Each is renamed before it is emptied, so half of one is never seen.
    """
    found = sorted((step_of(p), p) for p in Path(folder).glob("step-*") if step_of(p) is not None)
    keep = {step for step, _ in found[-config.keep_last :]}
    if config.keep_best and best is not None:
        keep.add(best)
    spans = set()
    for step, _ in found:
        span = step // config.keep_every_images if config.keep_every_images else None
        if span is not None and span not in spans:
            spans.add(span)
            keep.add(step)
    removed = []
    for step, path in found:
        if step not in keep:
            doomed = path.with_name(f".removed-{path.name}")
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            removed.append(path)
    return removed


def disk_need(numbers: int, config: CheckpointConfig, total_images: int = 0) -> DiskNeed:
    """Disk space that a run's checkpoints take.

    Args:
        numbers: float32 numbers in one checkpoint: of every trained model its parameters x (weight
            + 2 moments + profiles).
        total_images: length of the run, for the ones kept forever.

    A new checkpoint is written before an old one goes.
    """
    one = 4 * numbers
    forever = -(-total_images // config.keep_every_images) if config.keep_every_images else 0
    count = config.keep_last + 1 + forever + int(config.keep_best)
    sentence = (
        f"a checkpoint takes {one / 1e9:.3g} GB; keeping {count - 1} takes up to "
        f"{count * one / 1e9:.3g} GB while one is written"
    )
    return DiskNeed(one, count * one, sentence)


def save_cost(
    parameters: int,
    profiles: int,
    ranks: int,
    largest_tensor: int,
    bytes_per_second: float = 1e9,
    sharded: bool = True,
) -> SaveCost:
    """Time and memory of one save, by formula.

    Args:
        largest_tensor: elements of the model's largest tensor.
        bytes_per_second: what one rank writes (disk) and hashes, whichever is slower.
        sharded: False when every rank holds everything (each still saves 1 / ranks of it).

    Each rank writes 4 x parameters x (3 + profiles) / ranks bytes and holds one range at a time on
    the host, at most the largest tensor's. For 675 million parameters, one profile and 8 ranks:
    1.35 GB per rank, 1.35 s at 1 GB/s.
    """
    each = -(-4 * parameters * (3 + profiles) // ranks)
    peak = 4 * (-(-largest_tensor // ranks) if not sharded else largest_tensor)
    return SaveCost(each, each / bytes_per_second, peak)


__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "disk_need",
    "latest_checkpoint",
    "load_checkpoint",
    "prune_checkpoints",
    "read_weights",
    "save_checkpoint",
    "save_cost",
    "verify_checkpoint",
]
