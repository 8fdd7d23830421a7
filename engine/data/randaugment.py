"""RandAugment for batches of uint8 pictures, each with operations of its own; called by practice.

RandAugment (Cubuk et al. 2019, "RandAugment: practical automated data augmentation with a reduced
search space") changes a picture by `num_ops` operations drawn one after the other from fourteen,
all of one magnitude. Operations, magnitudes (31 bins) and rounding are those of torchvision's
`transforms.RandAugment` on tensors: nearest neighbours, and float32 between bytes. A position draws
its operations from Philox, so a picture's bytes do not depend on the batch that it is part of.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from etude.core.config import Config, option
from etude.core.rng import Stream, bits

from .upload import to_device

BINS = 31
_GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue


class RandAugmentConfig(Config):
    """Which operations change a picture; num_ops=0 turns them off."""

    num_ops: int = option(0, "operations on each picture, one after the other; 0: none", ge=0)
    magnitude: int = option(9, "their strength, a bin of 31", ge=0, lt=BINS)
    fill: int = option(0, "level of what comes into a picture from outside", ge=0, le=255)


def randaugment(
    images: Tensor, positions: np.ndarray, seed: int, config: RandAugmentConfig
) -> Tensor:
    """Pictures (B, C, H, W) uint8 with C of 1 or 3, each changed by the operations it draws.

    Args:
        positions: (B,) int64; a position fixes the operations and their signs.
    """
    chosen, negative = draw_operations(positions, seed, config.num_ops)
    numbers = np.zeros((*chosen.shape, 6), np.float32)
    for number in np.unique(chosen):
        rows = chosen == number
        name, size = OPERATIONS[number], images.shape[2:]
        numbers[rows] = _numbers(name, config.magnitude, negative[rows], size)
    counts = [np.bincount(row, minlength=len(OPERATIONS)).tolist() for row in chosen]
    order = to_device(np.argsort(chosen, axis=1, kind="stable"), images.device)
    numbers = to_device(numbers, images.device)
    for turn, sizes in enumerate(counts):
        changed = images.clone()
        for name, at in zip(OPERATIONS, order[turn].split(sizes), strict=True):
            if len(at):
                changed[at] = _change(name, images[at], numbers[turn][at], config)
        images = changed
    return images


def draw_operations(
    positions: np.ndarray, seed: int, num_ops: int
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of operations, and whether each is negated, both (num_ops, B)."""
    words = bits(seed, Stream.RANDAUGMENT, positions, 2 * num_ops).astype(np.int64).T
    return words[::2] * len(OPERATIONS) >> 32, (words[1::2] & 1).astype(bool)


def apply(name: str, images: Tensor, magnitude: int, negative: np.ndarray, fill: int = 0) -> Tensor:
    """One operation on pictures (B, C, H, W) uint8.

    Args:
        magnitude: the bin, 0 .. 30.
        negative: (B,) bool, rows whose magnitude is negated; of no effect for unsigned operations.
    """
    numbers = _numbers(name, magnitude, negative, images.shape[2:])
    config = RandAugmentConfig(num_ops=1, magnitude=magnitude, fill=fill)
    return _change(name, images, to_device(numbers, images.device), config)


def _numbers(name: str, magnitude: int, negative: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What an operation takes of each row's sign (B,) bool: (B, 6) float32.

    For pictures that are moved, the map of `_sampled`; for blends, the two factors first.
    """
    if name in _GEOMETRIC:
        return np.where(negative[:, None], *(_map(name, magnitude, s, size) for s in (-1, 1)))
    made = np.zeros((len(negative), 6), np.float32)
    if name in _BLENDS:
        strength = float(torch.linspace(0.0, 0.9, BINS)[magnitude])
        factors = 1.0 + np.where(negative, -strength, strength)
        made[:, 0], made[:, 1] = factors, 1.0 - factors
    return made


def _change(name: str, images: Tensor, numbers: Tensor, config: RandAugmentConfig) -> Tensor:
    """One operation on pictures (B, C, H, W) uint8, each with its numbers (B, 6) float32."""
    if name in _GEOMETRIC:
        return _sampled(images, numbers.view(-1, 2, 3), config.fill)
    if name in _BLENDS:
        other = _BLENDS[name](images)
        return images if other is images else _blend(images, other, numbers)
    if name == "Posterize":
        dropped = round(config.magnitude / ((BINS - 1) / 4))
        return images & (256 - 2**dropped)
    if name == "Solarize":
        threshold = float(torch.linspace(255.0, 0.0, BINS)[config.magnitude])
        return torch.where(images >= threshold, 255 - images, images)
    if name == "AutoContrast":
        return _autocontrast(images)
    if name == "Equalize":
        return _equalize(images)
    return images


def _map(name: str, magnitude: int, sign: int, size: tuple[int, int]) -> np.ndarray:
    """The linear map of pixels' places about the centre of `size` = (height, width), (6,) float32.

    It leads to coordinates in [-1, 1].
    """
    height, width = size
    top = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3}
    top |= {"TranslateX": 150.0 / 331.0 * width, "TranslateY": 150.0 / 331.0 * height}
    strength = float(torch.linspace(0.0, top[name], BINS)[magnitude])
    half = np.array([[0.5 * width], [0.5 * height]], np.float32)
    return (np.array(_place(name, sign * strength, height, width), np.float32) / half).ravel()


def _place(name: str, strength: float, height: int, width: int) -> list[list[float]]:
    """[[a, b, e], [c, d, f]]: a pixel at (x, y) of the output shows (ax + by + e, cx + dy + f)."""
    if name in ("ShearX", "ShearY"):
        # Through degrees and about the corner, rounding as torchvision does.
        angle, x, y = math.radians(math.degrees(math.atan(strength))), -0.5 * width, -0.5 * height
        if name == "ShearX":
            slope = math.tan(angle)
            return [[1.0, slope, (-x + slope * -y) + x], [0.0, 1.0, 0.0]]
        slope = math.sin(angle) / math.cos(angle)
        return [[1.0, 0.0, 0.0], [slope, 1.0, (slope * -x - y) + y]]
    if name == "TranslateX":
        return [[1.0, 0.0, -float(int(strength))], [0.0, 1.0, 0.0]]
    if name == "TranslateY":
        return [[1.0, 0.0, 0.0], [0.0, 1.0, -float(int(strength))]]
    cos, sin = math.cos(math.radians(strength)), math.sin(math.radians(strength))
    return [[cos, -sin, 0.0], [sin, cos, 0.0]]


def _sampled(images: Tensor, maps: Tensor, fill: int) -> Tensor:
    """Nearest neighbours at maps (B, 2, 3) float32 of places about the centre.

    Maps lead to coordinates in [-1, 1] in float32, as `grid_sample` takes them, so that a place
    between two pixels goes to the same one. Only single products and sums are used, whose
    results do not depend on the batch or the device; the second product is added unrounded, as the
    fused operations of a matrix product do it.
    """
    count, _, height, width = images.shape
    device = images.device
    x = torch.linspace(-width * 0.5 + 0.5, width * 0.5 - 0.5, width, device=device)
    y = torch.linspace(-height * 0.5 + 0.5, height * 0.5 - 0.5, height, device=device)[:, None]
    near = []
    for axis, extent in enumerate((width, height)):
        a, b, shift = (maps[:, axis, i, None, None] for i in range(3))
        place = ((a * x).double() + b.double() * y.double()).float() + shift
        near.append(torch.round(((place + 1.0) * extent - 1.0) / 2.0).to(torch.int64))
    column, row = near
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    flat = index.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    picked = images.flatten(2).gather(2, flat).view_as(images)
    return torch.where(inside[:, None], picked, torch.full_like(picked, fill))


def _blend(images: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    """own * picture + rest * other in float32, cut off to bytes; factors (B, 2 or more)."""
    own, rest = (column[:, None, None, None] for column in factors.T[:2])
    return (own * images + rest * other).clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Luma of three channels (B, 1, H, W), cut off to bytes; one channel is returned as it is."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.float().split(1, dim=1)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue).to(torch.uint8)


def _mean(images: Tensor) -> Tensor:
    """Mean luma (B, 1, 1, 1) float32; the sum is exact."""
    grey = _grey(images)
    total = grey.sum((1, 2, 3), keepdim=True, dtype=torch.int64)
    return total.float() / grey[0].numel()


def _smoothed(images: Tensor) -> Tensor:
    """A 3 x 3 mean whose centre counts five times; the border stays as it is."""
    if min(images.shape[2:]) <= 2:
        return images
    wide = images.to(torch.int32)
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    made = images.clone()
    # Thirteenths are never halfway between two whole numbers.
    made[:, :, 1:-1, 1:-1] = ((2 * sums + 13) // 26).to(torch.uint8)
    return made


def _autocontrast(images: Tensor) -> Tensor:
    """Each channel stretched to 0 .. 255; a channel of one level stays as it is."""
    low, high = (f(images, (2, 3), keepdim=True).float() for f in (torch.amin, torch.amax))
    scale = 255.0 / (high - low)
    flat = high == low
    low, scale = low.masked_fill(flat, 0.0), scale.masked_fill(flat, 1.0)
    return ((images - low) * scale).clamp(0, 255).to(torch.uint8)


def _equalize(images: Tensor) -> Tensor:
    """Each channel's levels spread so that they are about equally frequent."""
    planes = images.flatten(2).flatten(0, 1).to(torch.int64)
    counts = torch.zeros((len(planes), 256), dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, planes, torch.ones_like(planes))
    highest = planes.amax(1, keepdim=True)
    step = (planes.shape[1] - counts.gather(1, highest)) // 255
    table = (counts.cumsum(1) + step // 2) // step.clamp(min=1)
    table = F.pad(table, (1, 0))[:, :-1].clamp(0, 255)
    made = torch.where(step == 0, planes, table.gather(1, planes))
    return made.to(torch.uint8).view_as(images)


_BLENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "Brightness": torch.zeros_like,
    "Color": _grey,
    "Contrast": _mean,
    "Sharpness": _smoothed,
}
_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
# In torchvision's order, from which an operation is drawn.
OPERATIONS = (
    "Identity",
    *_GEOMETRIC,
    *("Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
)
