"""The reference decoder: Pillow in a thread pool, results as torch tensors; works everywhere.

Called by the loader, and by the DALI decoder for pictures that DALI cannot read. Decode → upright →
grey or colour → cut out the crop → antialiased bicubic resize (Pillow's, a = -0.5; the crop is
cut first, so no pixel outside it is used) → flip → [-1, 1]. Transparency is laid over white,
16-bit channels keep their high byte, CMYK goes through Pillow's plain conversion.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from etude.core.errors import UserError

from .augment import Geometry
from .picture import BadPicture, probe
from .shards import Sample

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_CHUNK = 16  # pictures per task: small pictures would otherwise cost more in hand-over than in work


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 (..., H, W, C) to float32 (..., C, H, W) in [-1, 1]."""
    return images.movedim(-1, -3).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def decode_picture(data: bytes | memoryview, channels: int) -> Image.Image:
    """A whole upright picture with 1 or 3 channels of 8 bits; raises `BadPicture`."""
    orientation = probe(data).orientation
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # Pillow's format plug-ins raise many kinds on damaged files
        raise BadPicture(f"it cannot be decoded ({' '.join(str(error).split())})") from None
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return _flatten(image).convert("L" if channels == 1 else "RGB")


def _flatten(image: Image.Image) -> Image.Image:
    """8-bit channels without transparency."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((wide >> 8).astype(np.uint8))
    if image.mode == "F":
        return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        clear = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, clear).convert("RGB")
    return image


class Decoder:
    """Decodes batches on the CPU with `workers` threads.

    Args:
        image_size: side of the result in pixels.
        channels: 1 or 3.
        workers: threads.
    """

    name = "torch"

    def __init__(self, image_size: int, channels: int, workers: int = 1) -> None:
        self.image_size, self.channels = image_size, channels
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode")

    def __call__(self, samples: Sequence[Sample], geometry: Geometry) -> torch.Tensor:
        """Training pictures (B, C, S, S) float32 in [-1, 1]; raises `UserError` on a bad one."""
        images, faults = self.decode(samples, geometry)
        for row, reason in faults.items():
            raise UserError(f"{samples[row].shard}: {samples[row].key}: {reason}")
        return to_signed(images)

    def decode(
        self, samples: Sequence[Sample], geometry: Geometry
    ) -> tuple[torch.Tensor, dict[int, str]]:
        """Pictures (B, S, S, C) uint8, and the reason for each row that could not be decoded."""
        shape = (len(samples), self.image_size, self.image_size, self.channels)
        images, faults = np.zeros(shape, dtype=np.uint8), {}

        def work(start: int) -> None:
            for row in range(start, min(start + _CHUNK, len(samples))):
                try:
                    images[row] = self._one(samples[row].data, geometry.row(row))
                except BadPicture as error:
                    faults[row] = str(error)

        list(self._pool.map(work, range(0, len(samples), _CHUNK)))
        return torch.from_numpy(images), dict(sorted(faults.items()))

    def _one(self, data: bytes | memoryview, cut: tuple[int, int, int, int, bool]) -> np.ndarray:
        image = decode_picture(data, self.channels)
        top, left, height, width, flip = cut
        if (top, left, height, width) != (0, 0, image.height, image.width):
            image = image.crop((left, top, left + width, top + height))
        side = (self.image_size, self.image_size)
        if image.size != side:
            image = image.resize(side, Image.Resampling.BICUBIC)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image).reshape(self.image_size, self.image_size, self.channels)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
