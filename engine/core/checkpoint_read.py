"""Reading checkpoints: verify, find the newest complete one, read ranges or whole weights.

Called by `checkpoint.py` (resume) and by sampling, evaluation and export, which need no strategy.
Everything that the manifest says is checked before a number is used, so that truncated, altered
and foreign folders are refused with one sentence.
"""

import difflib
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Checkpoint:
    """An opened checkpoint folder; reads ranges of tensors by name and state."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.images_seen: int = manifest["images_seen"]
        self._tensors = {(t["name"], t["state"]): t for t in manifest["tensors"]}
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._files = {}
        self._stack.close()

    def names(self, state: str) -> list[str]:
        """Names of the tensors that have a state."""
        return [name for name, s in self._tensors if s == state]

    def shape(self, name: str, state: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return tuple(self._tensors[name, state]["shape"])

    def read(self, name: str, state: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened tensor, 1-d on the CPU.

        Only these bytes are read.
        """
        entry = self._tensors[name, state]
        result = torch.empty(length, dtype=_TORCH[entry["dtype"]])
        filled = 0
        for file, key, first, count in sorted(entry["parts"], key=lambda part: part[2]):
            low, high = max(first, start + filled), min(first + count, start + length)
            if low == start + filled and low < high:
                piece = self._open(file).get_slice(key)[low - first : high - first]
                result[filled : filled + high - low] = piece
                filled += high - low
        if filled != length:
            raise UserError(f"{self.path}: {name} ({state}) has no element {start + filled}")
        return result

    def _open(self, file: str) -> Any:
        if file not in self._files:
            handle = safe_open(str(self.path / file), framework="pt")
            self._files[file] = self._stack.enter_context(handle)
        return self._files[file]

    def check_fits(self, wanted: Mapping[tuple[str, str], tuple[int, ...]]) -> None:
        """Compare with (name, state) -> shape of everything that is to be filled.

        Raises:
            UserError: naming what differs in shape, is missing or is left over, with the nearest
                names.
        """
        here, there = {n for n, _ in wanted}, {n for n, _ in self._tensors}
        common = [key for key in wanted if key in self._tensors]
        wrong = {
            f"{name} is {list(self.shape(name, state))} there and {list(wanted[name, state])} here"
            for name, state in common
            if self.shape(name, state) != tuple(wanted[name, state])
        }
        lines = [_some(sorted(wrong))] if wrong else []
        if here - there:
            shown = [_with_nearest(name, there) for name in sorted(here - there)]
            lines.append(f"not in it: {_some(shown)}")
        if there - here:
            shown = [_with_nearest(name, here) for name in sorted(there - here)]
            lines.append(f"only in it: {_some(shown)}")
        if not lines:
            odd = sorted(set(wanted) ^ set(self._tensors))
            shown = [f"{state} of {name}" for name, state in odd]
            lines += [f"the optimizer states differ: {_some(shown)}"] if shown else []
        if lines:
            raise UserError(
                f"{self.path} belongs to another model or optimizer: {'; '.join(lines)}; "
                "resume with the recipe that wrote it"
            )


def _some(items: list[str]) -> str:
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + more


def _with_nearest(name: str, have: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(have), n=1)
    return f"{name} (nearest: {near[0]})" if near else name


def step_of(path: Path) -> int | None:
    """images_seen of a checkpoint folder's name, or None."""
    match = re.fullmatch(r"(?:\.replaced-)?step-(\d{12,})", path.name)
    return int(match[1]) if match else None


def fingerprint_of(body: Mapping[str, Any]) -> str:
    """sha256 of a manifest without its own "sha256"."""
    plain = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def verify_checkpoint(path: Path, hashes: bool = True, rank: int = 0, size: int = 1) -> Checkpoint:
    """Open a checkpoint after checking it.

    Args:
        hashes: also compare sha256 of every file; with `size` > 1 this rank's share of the files.

    Raises:
        UserError: what is damaged and where.
    """
    manifest = _read_manifest(path)
    for i, file in enumerate(manifest["files"]):
        member = path / file["file"]
        try:
            actual = member.stat().st_size
        except OSError:
            raise UserError(f"{member} is missing; the checkpoint is incomplete") from None
        if actual != file["size"]:
            raise UserError(f"{member} has {actual} bytes instead of {file['size']}: truncated")
        if hashes and i % size == rank and _sha256(member) != file["sha256"]:
            raise UserError(f"{member} was altered: its sha256 differs from the manifest's")
    for tensor in manifest["tensors"]:
        _check_cover(path, tensor)
    return Checkpoint(path, manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    member = path / MANIFEST
    try:
        manifest = json.loads(member.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} has no {MANIFEST}: not a complete Etude checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{member} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise UserError(f"{member} is not the manifest of an Etude checkpoint")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{member} has format {manifest['format']!r}, this version reads {FORMAT}; "
            "use the Etude version that wrote it"
        )
    if manifest.get("sha256") != fingerprint_of(manifest):
        raise UserError(f"{member} was altered: its own sha256 does not match")
    return manifest


def _check_cover(path: Path, tensor: dict[str, Any]) -> None:
    reached = 0
    for _, _, start, length in sorted(tensor["parts"], key=lambda part: part[2]):
        if start > reached:
            break
        reached = max(reached, start + length)
    if reached != math.prod(tensor["shape"]):
        raise UserError(
            f"{path}: {tensor['name']} ({tensor['state']}) is saved only up to element {reached} "
            f"of {math.prod(tensor['shape'])}"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def latest_checkpoint(folder: Path, hashes: bool = True) -> Path | None:
    """The newest complete checkpoint, verified; broken ones are skipped with a warning that names
    them. None when there is none. Meant for rank 0, which tells the others.
    """
    found = [(step_of(p), p.name[0] != ".", p) for p in Path(folder).glob("*step-*") if p.is_dir()]
    for _, _, path in sorted((item for item in found if item[0] is not None), reverse=True):
        try:
            verify_checkpoint(path, hashes)
        except UserError as error:
            warnings.warn(f"skipping a broken checkpoint: {error}", stacklevel=2)
            continue
        return path
    return None


def read_weights(path: Path, profile: str = "raw", hashes: bool = True) -> dict[str, Tensor]:
    """Whole weights of a profile for sampling and export, without a strategy.

    Args:
        profile: "raw" or "ema:<decay>" as saved; frozen weights and buffers come with any.

    Returns:
        State-dict name -> CPU tensor, trainable ones float32.

    Raises:
        UserError: the checkpoint is damaged or has no such profile.
    """
    with verify_checkpoint(Path(path), hashes) as checkpoint:
        profiles = checkpoint.manifest["profiles"]
        if profile not in profiles:
            raise UserError(f"{path} has no weights {profile!r}; it has {', '.join(profiles)}")
        averaged = set(checkpoint.names(profiles[profile]))
        weights = {}
        try:
            for name in checkpoint.names("weight"):
                state = profiles[profile] if name in averaged else "weight"
                shape = checkpoint.shape(name, state)
                weights[name] = checkpoint.read(name, state, 0, math.prod(shape)).reshape(shape)
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    return weights | {a: weights[n] for a, n in checkpoint.manifest["aliases"].items()}
