"""Pictures that are arrays already: in memory, or in an `.npz` archive as samples are published.

Imported by sets.py, which is where others take them from.
"""

import functools
import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etude.core.errors import UserError

from .decoding import Form, files_sha256
from .picture_set import Pictures, Stages, digest, group_of, spread, stacked

_LOCAL_HEADER = 30  # bytes of a zip member's own header before its name


class ArrayPictures:
    """Pictures in memory.

    Args:
        images: uint8 (N, H, W, C) or (N, H, W), an array or a tensor with C of 1 or 3; or a list of
            arrays (H, W, C) of different sizes.
        keys: of the pictures; by default their numbers.
        labels: (N,) class indices, -1 for none; by default none.
        groups: "" for none; by default the class of each.
        classes: class names.
        name: shown to people.
        size, fit, channels: as in `Form`; by default pictures are kept as they are.
        limit: so many pictures only, spread over classes and groups; 0 all.

    Raises:
        UserError: no pictures, other types or shapes, or other numbers of keys, labels or groups.
    """

    def __init__(
        self,
        images: np.ndarray | torch.Tensor | Sequence[np.ndarray],
        keys: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        groups: Sequence[str] | None = None,
        *,
        classes: Sequence[str] = (),
        name: str = "arrays",
        size: int = 0,
        fit: str = "crop",
        channels: int = 0,
        limit: int = 0,
    ) -> None:
        whole = images.cpu().numpy() if isinstance(images, torch.Tensor) else images
        if isinstance(whole, np.ndarray) and not whole.ndim:
            _check(whole, name)
        count = len(whole)
        if not count:
            raise UserError(f"{name} holds no pictures; give one or more")
        self.name, self.classes = name, list(classes)
        for image in whole[:1] if isinstance(whole, np.ndarray) else whole:
            _check(image, name)
        names = [f"{i:09d}" for i in range(count)] if keys is None else list(keys)
        given = [-1] * count if labels is None else _numbers(labels, name)
        own = [group_of(self.classes, n) for n in given] if groups is None else list(groups)
        for what, found in (("keys", names), ("labels", given), ("groups", own)):
            if len(found) != count:
                raise UserError(f"{name}: {len(found)} {what} for {count} pictures; give as many")
        some = spread(list(zip(given, own, strict=True)), limit)
        if len(some) < count:
            whole = whole[some] if isinstance(whole, np.ndarray) else [whole[i] for i in some]
        self._images, self._labels = whole, np.array([given[i] for i in some], np.int64)
        self.keys, self._groups = [names[i] for i in some], [own[i] for i in some]
        self._form = Form(size, fit, channels)
        self.protocol: dict[str, Any] = self._form.protocol

    def __len__(self) -> int:
        return len(self.keys)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the content, keys, labels, groups and form."""
        about = [self._content(), self.keys, self._labels.tolist(), self._groups, self.classes]
        return digest(["arrays", *about, *self._form.parts])

    def read(self, start: int, stop: int, stages: Stages) -> Pictures:
        """Pictures start to stop."""
        with stages("read"):
            images = [_colours(np.asarray(image)) for image in self._images[start:stop]]
        with stages("decode"):
            images = stacked([self._form.array(image) for image in images])
        keys, labels = self.keys[start:stop], self._labels[start:stop].copy()
        return Pictures(images, keys, labels, self._groups[start:stop])

    def _content(self) -> str:
        found = hashlib.sha256()
        for image in self._images:
            found.update(repr(image.shape).encode())
            found.update(np.ascontiguousarray(image))
        return found.hexdigest()


class NpzPictures(ArrayPictures):
    """The pictures of an `.npz` archive: `arr_0` uint8 (N, H, W, 3), `arr_1` labels if it is there.

    This is how ADM and those who follow it publish samples and references (Dhariwal and Nichol
    2021); other members, such as stored statistics, are not looked at. An archive that is not
    compressed is read from the disk as it is needed.

    Args:
        classes, size, fit, channels, limit: as in `ArrayPictures`.

    Raises:
        UserError: no such file, or `arr_0` is missing, damaged or something else.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        classes: Sequence[str] = (),
        size: int = 0,
        fit: str = "crop",
        channels: int = 0,
        limit: int = 0,
    ) -> None:
        self.path = Path(path)
        try:
            images, labels = _members(self.path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            reason = "it has no arr_0" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{path} is no archive of pictures ({' '.join(reason.split())}); it should hold "
                f"arr_0, uint8 of (pictures, height, width, 3)"
            ) from None
        form = {"size": size, "fit": fit, "channels": channels, "limit": limit}
        super().__init__(images, labels=labels, classes=classes, name=str(path), **form)

    def _content(self) -> str:
        return files_sha256([self.path])[0]


def _members(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Pictures, mapped from the disk where they are stored plainly, and labels."""
    opened = np.load(path, allow_pickle=False)
    if isinstance(opened, np.ndarray):
        raise ValueError("it is one array, as numpy.save writes it")
    with opened as archive:
        labels = archive["arr_1"] if "arr_1" in archive.files else None
        with zipfile.ZipFile(path) as file:
            info = file.getinfo("arr_0.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return archive["arr_0"], labels
    with path.open("rb") as stream:
        stream.seek(info.header_offset)
        header = stream.read(_LOCAL_HEADER)
        # The member's data follow its local header, its name and its extra field (APPNOTE 4.3.7).
        extra = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        stream.seek(extra, 1)
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"an .npy of version {version}")
        shape, turned, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype != np.uint8:
            raise ValueError(f"its arr_0 is {dtype}")
        order = "F" if turned else "C"
        return np.memmap(path, dtype, "r", stream.tell(), shape, order), labels


def _numbers(labels: Any, name: str) -> list[int]:
    found = np.asarray(labels)
    if found.ndim != 1 or (len(found) and not np.issubdtype(found.dtype, np.integer)):
        raise UserError(
            f"{name}: labels are {found.dtype} of shape {found.shape}; give a whole number for "
            "each picture, its class's or -1"
        )
    return found.tolist()


def _check(image: Any, name: str) -> None:
    shape, dtype = getattr(image, "shape", ()), getattr(image, "dtype", type(image).__name__)
    if (
        dtype != np.uint8
        or len(shape) not in (2, 3)
        or (len(shape) == 3 and shape[2] not in (1, 3))
    ):
        raise UserError(
            f"{name}: a picture is {dtype} of shape {tuple(shape)}; give uint8 of (height, width, "
            f"1 or 3), transparency laid over white"
        )


def _colours(image: np.ndarray) -> np.ndarray:
    return image[..., None] if image.ndim == 2 else image
