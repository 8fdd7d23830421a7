"""Encoded pictures and arrays brought to one form: decoded, fitted to a square, hashed.

Every set of sets.py and arrays.py goes through `Form`, so that real and generated pictures take the
same steps with the same rounding. PNG is decoded exactly. JPEG is decoded at full size with
libjpeg-turbo's accurate integer transform and smooth chroma, never at a reduced scale; the decoded
8-bit picture is then resized. Transparency is laid over white, 16-bit channels keep their high
byte, palettes and CMYK become RGB, Exif orientation is applied (data/decode_torch.py).
"""

import functools
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from etude.core.errors import UserError
from etude.core.files import file_sha256
from etude.data.decode_torch import decode_picture
from etude.data.picture import BadPicture

FITS = {
    "crop": "central square, antialiased bicubic",
    "squash": "whole picture squeezed into a square, antialiased bicubic",
    "as stored": "as stored",
}
FIT = FITS["crop"]
_MODES = {1: "L", 3: "RGB"}
_JUST_NOW = 2.0  # seconds within which a changed file may keep its time stamp
_CHUNK = 8  # pictures per task: small ones cost more in hand-over than in work


@dataclass(frozen=True)
class Form:
    """How pictures leave a set.

    Attributes:
        size: side of the square that they are brought to, pixels; 0 keeps each as it is.
        fit: "crop" takes the central square and resizes it; "squash" resizes the whole picture,
            whatever its shape; "as stored" goes with size 0 alone.
        channels: 1 (ITU-R BT.601 luma, rounded) or 3; 0 keeps arrays as they are.

    Raises:
        UserError: no such fit, or one without effect.
    """

    size: int = 0
    fit: str = "crop"
    channels: int = 3

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise UserError(f"there is no fit {self.fit!r}; choose one of {', '.join(FITS)}")
        if self.fit == "squash" and not self.size:
            raise UserError("fit=squash has no effect without a size; set image_size=PIXELS")
        if self.fit == "as stored" and self.size:
            raise UserError(
                f"fit='as stored' and a size of {self.size} pixels contradict each other; "
                f"leave image_size out, or choose crop or squash"
            )
        if self.size < 0 or self.channels not in (0, 1, 3):
            raise ValueError(f"size {self.size} and {self.channels} channels are no form")

    @property
    def protocol(self) -> dict[str, Any]:
        """What an evaluation's protocol says of it."""
        return {
            "image_size": self.size,
            "fit": FITS[self.fit] if self.size else FITS["as stored"],
            "channels": self.channels or "as drawn",
        }

    @property
    def parts(self) -> list:
        """What a fingerprint says of it."""
        return [self.size, self.channels, *(["squash"] if self.fit == "squash" else [])]

    def picture(self, image: Image.Image) -> np.ndarray:
        """A decoded picture as (H, W, C) uint8 in this form."""
        side = (self.size, self.size)
        if self.size and self.fit == "crop" and image.width != image.height:
            edge = min(image.size)
            left, top = (image.width - edge) // 2, (image.height - edge) // 2
            image = image.crop((left, top, left + edge, top + edge))
        if self.size and image.size != side:
            image = image.resize(side, Image.Resampling.BICUBIC)
        array = np.asarray(image)
        return array if array.ndim == 3 else array[..., None]

    def array(self, image: np.ndarray) -> np.ndarray:
        """An array (H, W, 1 or 3) uint8 in this form, through the steps that a picture takes."""
        same = self.channels in (0, image.shape[2])
        if same and (not self.size or image.shape[:2] == (self.size, self.size)):
            return image
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        return self.picture(picture if same else picture.convert(_MODES[self.channels]))

    def decode(
        self, data: Sequence[bytes | memoryview], keys: Sequence[str], where: str
    ) -> list[np.ndarray]:
        """Encoded pictures in this form, by a few threads.

        Raises:
            UserError: one cannot be decoded; it is named, never left out.
        """

        def work(start: int) -> list[np.ndarray]:
            some = slice(start, start + _CHUNK)
            pairs = zip(data[some], keys[some], strict=True)
            return [self._one(one, key, where) for one, key in pairs]

        parts = pool().map(work, range(0, len(data), _CHUNK))
        return [image for part in parts for image in part]

    def _one(self, data: bytes | memoryview, key: str, where: str) -> np.ndarray:
        try:
            return self.picture(decode_picture(data, self.channels or 3))
        except BadPicture as error:
            raise UserError(
                f"{where}: picture {key} cannot be used: {error}; remove it, since a figure "
                f"over fewer pictures than stated would be wrong"
            ) from None


def pool() -> ThreadPoolExecutor:
    """The threads that read, hash and decode: one per core that this process may use, at most 16.

    Pillow and hashlib let other threads run meanwhile.
    """
    return _pool(os.getpid())  # threads do not survive a fork


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0))), "pictures")


def files_sha256(paths: Sequence[Path]) -> list[str]:
    """The sha256 of each file; one that has not changed is read once in a process."""
    return list(pool().map(_known_sha256, paths))


_HASHES: dict[tuple, str] = {}


def _known_sha256(path: Path) -> str:
    found = path.stat()
    key = (str(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if key not in _HASHES:
        value = file_sha256(path)
        # Time stamps are coarse: a file that was written just now may change without a new one.
        if time.time() - found.st_mtime < _JUST_NOW:
            return value
        _HASHES[key] = value
    return _HASHES[key]
