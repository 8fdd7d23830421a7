"""What a learner sees of a picture of a pool: shifts, random resized crops, mirroring, erasing.

Called by practice for batches of equally large uint8 pictures on any device. Every choice is drawn
from Philox by position, on the host; the pixels are then changed for the whole batch at once, by
whole-number arithmetic, so that a position's picture has the same bytes in every batch and on every
device. Random resized crops are those of Szegedy et al. 2015 ("Going deeper with convolutions"),
erasing is that of Zhong et al. 2017 ("Random erasing data augmentation").
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from etude.core.rng import Stream, bits, uniform
from etude.kernels.resizing import BITS

from .upload import to_device

_TRIES = 10  # rectangles drawn for a position before it goes without
_CHUNK = 64  # pictures resampled at a time: their weights take 0.8 MB each for 224 pixels
_ERASED_AREA = (0.02, 0.33)
_ERASED_RATIO = (0.3, 3.3)


@dataclass(frozen=True)
class Boxes:
    """Rectangles of a batch, (B,) int64 each, in pixels; an empty one has height 0."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray

    def __len__(self) -> int:
        return len(self.top)

    def on(self, device: torch.device) -> Tensor:
        """Top, left, height and width in rows of one tensor, (4, B) int64, on a device."""
        return to_device(np.stack(tuple(vars(self).values())), device)


def shifted(images: Tensor, positions: np.ndarray, shift: int, seed: int) -> Tensor:
    """Pictures (B, C, H, W) uint8 moved by up to `shift` pixels each way; black comes in.

    A position draws its shift uniformly over all offsets in both directions.
    """
    count, _, height, width = images.shape
    words = bits(seed, Stream.CROP, positions, 2).astype(np.int64) * (2 * shift + 1) >> 32
    top, left = to_device(words.T, images.device)
    padded = F.pad(images, (shift, shift, shift, shift))
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    lane = torch.arange(count, device=images.device)[:, None, None]
    # Advanced indices around a slice put their axes first: (B, H, W, C).
    picked = padded[lane, :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def mirrored(images: Tensor, positions: np.ndarray, seed: int) -> Tensor:
    """Pictures (B, C, H, W), half of them mirrored left to right, by position."""
    words = bits(seed, Stream.FLIP, positions, 1)[:, 0] & 1
    flip = to_device(words.astype(bool), images.device)
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def crop_boxes(
    positions: np.ndarray,
    seed: int,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Boxes:
    """Where each position cuts a picture of `size` = (height, width).

    A box has an area uniform over `scale` times the picture's, a width over height log-uniform over
    `ratio`, and a place uniform over those that fit. Where none of ten draws fits, it is the
    largest box about the centre whose sides keep to `ratio`.
    """
    found = _rectangles(positions, seed, Stream.CROP, size, scale, ratio, strict=False)
    height, width = size
    w = min(width, round(height * ratio[1])) if width > ratio[1] * height else width
    h = min(height, round(width / ratio[0])) if width < ratio[0] * height else height
    missing = found.height == 0
    centre = ((height - h) // 2, (width - w) // 2, h, w)
    sides = zip(vars(found).values(), centre, strict=True)
    return Boxes(*(np.where(missing, default, values) for values, default in sides))


def erase_boxes(positions: np.ndarray, seed: int, size: tuple[int, int], chance: float) -> Boxes:
    """What each position loses of a picture of `size`; nothing with probability 1 - `chance`.

    The area is 2% to 33% of the picture's and the height over the width 0.3 to 3.3, with sides
    shorter than the picture's; where none of ten draws is, nothing is lost.
    """
    flat = (1.0 / _ERASED_RATIO[1], 1.0 / _ERASED_RATIO[0])
    found = _rectangles(positions, seed, Stream.ERASE, size, _ERASED_AREA, flat, strict=True)
    # A block of its own, behind those of the rectangles.
    last = 4 * _TRIES
    hit = uniform(seed, Stream.ERASE, positions, last + 1)[:, last] < chance
    return Boxes(found.top, found.left, np.where(hit, found.height, 0), found.width)


def _rectangles(
    positions: np.ndarray,
    seed: int,
    stream: Stream,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    *,
    strict: bool,
) -> Boxes:
    """The first of ten rectangles that fits, height 0 where none does; `strict`: with room."""
    height, width = size
    numbers = uniform(seed, stream, positions, 4 * _TRIES).reshape(-1, _TRIES, 4)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[..., 0])
    low, high = np.log(ratio)
    shape = np.exp(low + (high - low) * numbers[..., 1])
    w = np.rint(np.sqrt(area * shape)).astype(np.int64)
    h = np.rint(np.sqrt(area / shape)).astype(np.int64)
    room = 1 if strict else 0
    fits = (w >= 1) & (w <= width - room) & (h >= 1) & (h <= height - room)
    first = fits.argmax(1)
    row = np.arange(len(first))
    h, w, numbers = h[row, first], w[row, first], numbers[row, first]
    h = np.where(fits.any(1), h, 0)
    top = (numbers[:, 2] * (height - h + 1)).astype(np.int64)
    left = (numbers[:, 3] * (width - w + 1)).astype(np.int64)
    return Boxes(top, left, h, w)


def resized_crops(images: Tensor, boxes: Boxes, size: int) -> Tensor:
    """Each picture's box, (B, C, H, W) uint8, brought to (B, C, size, size) uint8.

    Pillow's antialiased bilinear rule (`etude.kernels.resizing`) applied to the cut-out: weights of
    22 bits, along the width first, rounded to bytes, then along the height. The sums are products
    of matrices in float64, where these whole numbers are exact in any order.
    """
    made, where = [], boxes.on(images.device)
    for start in range(0, len(images), _CHUNK):
        x = images[start : start + _CHUNK]
        top, left, height, width = where[:, start : start + _CHUNK]
        across = _whole(resizing_weights(left, width, x.shape[3], size))
        down = _whole(resizing_weights(top, height, x.shape[2], size))
        x = _rounded(x.double() @ across.transpose(1, 2)[:, None])
        made.append(_rounded(down[:, None] @ x).to(torch.uint8))
    return torch.cat(made)


def _rounded(sums: Tensor) -> Tensor:
    return torch.floor((sums + 2.0 ** (BITS - 1)) * 2.0**-BITS).clamp(0, 255)


def _whole(weights: Tensor) -> Tensor:
    return torch.floor(weights * 2.0**BITS + 0.5)


def resizing_weights(low: Tensor, extent: Tensor, inputs: int, outputs: int) -> Tensor:
    """What each of `inputs` pixels adds to each of `outputs` that show [low, low + extent).

    The antialiased bilinear rule: a triangle about an output's centre, as wide as the distance of
    outputs where that is more than a pixel.

    Args:
        low, extent: (B,) of any dtype, in pixels, on the device of the result.

    Returns:
        (B, outputs, inputs) float64; each row of inputs adds up to 1.
    """
    device = low.device
    start, extent = (v.to(torch.float64)[:, None, None] for v in (low, extent))
    scale = extent / outputs
    stretch = scale.clamp(min=1.0)
    centre = (torch.arange(outputs, device=device, dtype=torch.float64)[:, None] + 0.5) * scale
    first = torch.floor(centre - stretch + 0.5).clamp(min=0.0)
    last = torch.minimum(torch.floor(centre + stretch + 0.5), extent)
    index = torch.arange(inputs, device=device, dtype=torch.float64) - start
    taps = (1.0 - ((index - centre + 0.5) * (1.0 / stretch)).abs()).clamp(min=0.0)
    taps = torch.where((index >= first) & (index < last), taps, 0.0)
    return taps / taps.sum(-1, keepdim=True)


def erased(pictures: Tensor, boxes: Boxes) -> Tensor:
    """Pictures (B, C, H, W) of any dtype with their boxes set to 0."""
    device = pictures.device
    top, left, height, width = boxes.on(device)[:, :, None, None]
    rows = torch.arange(pictures.shape[2], device=device)[:, None]
    columns = torch.arange(pictures.shape[3], device=device)
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    return pictures.masked_fill(inside[:, None], 0)
