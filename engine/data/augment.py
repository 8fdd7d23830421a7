"""Crops and flips as pure functions of (seed, position) and picture size; called by the loader.

Nothing here touches pixels: the geometry is computed first and handed to whichever decoder runs,
so a position has the same crop for every decoder, world size and resume.
"""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from pydantic import model_validator

from etude.core.config import Config, option
from etude.core.rng import Stream, bits, uniform

_DEFAULT_SCALE = (0.25, 1.0)


class AugmentConfig(Config):
    """How a stored picture becomes a training picture."""

    image_size: int = option(help="side of the square training picture", unit="pixels", ge=1)
    crop: Literal["none", "center", "random"] = option(
        "center",
        "none: the whole picture is resized; center: its central square; random: a square inside",
    )
    scale: tuple[float, float] | None = option(
        None,
        "smallest and largest area of a random crop, relative to the largest square that fits;"
        " 0.25 to 1 unless given",
    )
    flip: bool = option(False, "mirror half of the pictures left to right")
    channels: Literal[1, 3] = option(3, "1 grey, 3 colour")

    def still(self) -> "AugmentConfig":
        """The same without chance: a central crop for a random one, no flip."""
        crop = "center" if self.crop == "random" else self.crop
        return self.model_copy(update={"crop": crop, "scale": None, "flip": False})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scale is None:
            return self
        if self.crop != "random":
            raise ValueError(f"scale has no effect with crop: {self.crop}; remove it")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must satisfy 0 < min <= max <= 1, not {self.scale}")
        return self


@dataclass(frozen=True)
class Geometry:
    """What is cut from each picture of a batch; every array is (B,).

    Attributes:
        crop_top, crop_left, crop_height, crop_width: the box, int64 pixels of the upright stored
            picture (before the flip).
        flip: bool, whether the cut-out is mirrored.
        height, width: size of the upright stored picture, int64 pixels.
    """

    crop_top: np.ndarray
    crop_left: np.ndarray
    crop_height: np.ndarray
    crop_width: np.ndarray
    flip: np.ndarray
    height: np.ndarray
    width: np.ndarray

    def control(self) -> dict[str, torch.Tensor]:
        """The same as conditions for a model: (B,) float32 by name, in pixels; flip is 0 or 1."""
        return {
            name: torch.from_numpy(np.asarray(values, dtype=np.float32))
            for name, values in vars(self).items()
        }

    def select(self, rows: list[int]) -> Self:
        """The geometry of some rows."""
        return type(self)(**{name: values[rows] for name, values in vars(self).items()})

    def row(self, index: int) -> tuple[int, int, int, int, bool]:
        """(top, left, height, width, flip) of one picture as Python numbers."""
        names = (self.crop_top, self.crop_left, self.crop_height, self.crop_width)
        return (*(int(array[index]) for array in names), bool(self.flip[index]))


def geometry(
    config: AugmentConfig,
    seed: int,
    positions: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> Geometry:
    """Crop boxes and flips of the pictures at `positions`.

    Args:
        positions: (B,) int64.
        heights, widths: (B,) sizes of the upright stored pictures in pixels.
    """
    positions = np.asarray(positions, dtype=np.int64)
    height, width = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    largest = np.minimum(height, width)
    if config.crop == "none":
        top, left = np.zeros_like(height), np.zeros_like(width)
        crop_height, crop_width = height, width
    elif config.crop == "center":
        top, left = (height - largest) // 2, (width - largest) // 2
        crop_height = crop_width = largest
    else:
        low, high = config.scale or _DEFAULT_SCALE
        numbers = uniform(seed, Stream.CROP, positions, 3)
        area = low + (high - low) * numbers[:, 0]
        side = np.rint(np.sqrt(area) * largest).astype(np.int64).clip(1, largest)
        top = (numbers[:, 1] * (height - side + 1)).astype(np.int64)
        left = (numbers[:, 2] * (width - side + 1)).astype(np.int64)
        crop_height = crop_width = side
    if config.flip:
        flip = (bits(seed, Stream.FLIP, positions, 1)[:, 0] & 1).astype(bool)
    else:
        flip = np.zeros(len(positions), dtype=bool)
    return Geometry(top, left, crop_height, crop_width, flip, height, width)
