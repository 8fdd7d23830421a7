"""Encoded pictures prepared without chance, decoded when they are asked for; called by practice.

A split of a million pictures fits no memory, so pictures are decoded in threads and only the first
of them, as many as a bound in bytes allows, are kept: a split is looked at from end to end again
and again, and then a cache that keeps what was used last would never hold what comes next.

Two ways to a square: with `shorter_side` 0 the central square is cut out and resized, bit for bit
what the loader makes of the same bytes; otherwise the shorter side is resized first and the square
is cut from the result, the way ImageNet accuracies are published (256, then 224 pixels). Both
resize with Pillow's antialiased bicubic filter.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from PIL import Image

from etude.core.environment import cpu_count
from etude.core.errors import UserError

from .augment import AugmentConfig, geometry
from .decode_torch import decode_picture
from .picture import BadPicture

CACHE_BYTES = 1 << 30
_CHUNK = 8  # pictures per task


class Encoded(Protocol):
    """Encoded pictures by index."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | memoryview:
        """The bytes of picture `index`; raises `BadPicture` or `OSError`."""

    def name(self, index: int) -> str:
        """What a message calls picture `index`."""


def prepare(
    data: bytes | memoryview,
    preparation: AugmentConfig,
    *,
    shorter_side: int = 0,
    border: int = 0,
) -> np.ndarray:
    """A picture (S, S, C) uint8 of its encoded bytes.

    Args:
        preparation: size, channels and crop, "center" or "none"; nothing in it may be random.
        shorter_side: pixels that the shorter side is resized to before the crop; 0: crop first.
        border: pixels cut away on every side before anything else.

    Raises:
        BadPicture: the picture cannot be decoded, or the border leaves nothing of it.
    """
    size = preparation.image_size
    image = decode_picture(data, preparation.channels)
    if border:
        if min(image.size) <= 2 * border:
            raise BadPicture(f"nothing is left within its border of {border} pixels")
        image = image.crop((border, border, image.width - border, image.height - border))
    if shorter_side:
        image = _shorter_side(image, shorter_side)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    else:
        zero, height, width = (np.array([n]) for n in (0, image.height, image.width))
        top, left, height, width, _ = geometry(preparation, 0, zero, height, width).row(0)
        image = image.crop((left, top, left + width, top + height))
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, preparation.channels)


def _shorter_side(image: Image.Image, side: int) -> Image.Image:
    """The longer side is rounded down, as in torchvision's Resize."""
    width, height = image.size
    if width <= height:
        target = side, side * height // width
    else:
        target = side * width // height, side
    return image if target == image.size else image.resize(target, Image.Resampling.BICUBIC)


class PreparedPictures:
    """Pictures (S, S, C) uint8 by index; the first ones are kept once they have been decoded."""

    def __init__(
        self,
        encoded: Encoded,
        preparation: AugmentConfig,
        *,
        shorter_side: int = 0,
        border: int = 0,
        cache_bytes: int = CACHE_BYTES,
        workers: int = 0,
    ) -> None:
        """
        Args:
            cache_bytes: bound of the pictures that are kept.
            workers: decoding threads; 0: one per core.

        Raises:
            UserError: a random preparation, or a shorter side that is too short or has no effect.
        """
        if preparation.crop == "random" or preparation.flip:
            raise UserError(
                "pictures.crop=random and pictures.flip=true would change the real splits at "
                "random: type pictures.crop=center and learner.flip instead"
            )
        if shorter_side and (shorter_side < preparation.image_size or preparation.crop == "none"):
            raise UserError(
                f"pictures.shorter_side={shorter_side} needs pictures.crop=center and must not be "
                f"below pictures.image_size={preparation.image_size}; 0 turns it off"
            )
        self._encoded, self._preparation = encoded, preparation
        self._shorter_side, self._border = shorter_side, border
        self._workers = workers or cpu_count()
        self._shape = (preparation.image_size, preparation.image_size, preparation.channels)
        self.kept = min(len(encoded), cache_bytes // self.bytes_each)
        # numpy asks for pages as they are written, so the array costs what has been decoded.
        self._pixels = np.empty((self.kept, *self._shape), np.uint8)
        self._ready = np.zeros(self.kept, bool)

    @property
    def bytes_each(self) -> int:
        """Bytes of one decoded picture."""
        return int(np.prod(self._shape))

    def __len__(self) -> int:
        return len(self._encoded)

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Pictures (B, S, S, C) uint8 of indices (B,).

        Raises:
            UserError: a picture is damaged or gone; the message names it.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and not (0 <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"picture outside 0 to {len(self) - 1}")
        result = np.empty((len(indices), *self._shape), np.uint8)
        found = indices < self.kept
        found[found] = self._ready[indices[found]]
        result[found] = self._pixels[indices[found]]
        missing = np.flatnonzero(~found)

        def work(rows: np.ndarray) -> None:
            for row in rows:
                result[row] = self._decode(int(indices[row]))

        tasks = [missing[start : start + _CHUNK] for start in range(0, len(missing), _CHUNK)]
        if len(tasks) > 1 and self._workers > 1:
            with ThreadPoolExecutor(self._workers, thread_name_prefix="prepare") as pool:
                list(pool.map(work, tasks))
        else:
            for task in tasks:
                work(task)
        kept = missing[indices[missing] < self.kept]
        self._pixels[indices[kept]] = result[kept]
        self._ready[indices[kept]] = True
        return result

    def _decode(self, index: int) -> np.ndarray:
        try:
            return prepare(
                self._encoded.read(index),
                self._preparation,
                shorter_side=self._shorter_side,
                border=self._border,
            )
        except (BadPicture, OSError) as error:
            raise UserError(
                f"{self._encoded.name(index)} cannot be read ({error}); repair or remove it"
            ) from None
