"""Files that are either whole or absent, and their hashes; used by every room that writes a result.

A file is written under a temporary name in its own folder, flushed to the disk, and renamed over
the final name; the folder is flushed last, so a power cut leaves the old file or the new one.
"""

import hashlib
import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError


def write_bytes_atomic(path: Path, data: bytes, *, keep: bool = False) -> None:
    """Replace `path` by `data`, whole or not at all; missing folders are made.

    Args:
        keep: leave a file that is there already, also one that another process writes meanwhile:
            the first one stays (where the file system has hard links).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if not (keep and _linked(temporary, path)):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def _linked(temporary: Path, path: Path) -> bool:
    """Whether `path` is there now, by this call or before; False without hard links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return True
    except OSError:
        return path.exists()
    return True


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, whole or not at all."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: Path, data: Any) -> None:
    """Replace `path` by `data` as indented JSON; see `to_json` for what `data` may hold."""
    write_text_atomic(path, to_json(data, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; `UserError` when it is absent or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}); delete it or restore it from a copy"
        ) from None


def file_sha256(path: Path) -> str:
    """The sha256 of a file in hexadecimal, without reading it into memory as a whole."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(data: Any, indent: int | None = None) -> str:
    """JSON text of plain values, paths, numpy and torch scalars; NaN and infinities become null.

    Raises:
        TypeError: `data` holds something else.
    """
    return json.dumps(_plain(data), indent=indent, allow_nan=False, ensure_ascii=False)


def flush_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # numpy and torch scalars
        return _plain(value.item())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
