"""How pictures reach published networks, in Pillow's arithmetic; called by the backbones.

Publishers resize with Pillow and cut with torchvision, in bytes, and normalise last. So do these,
through the resize operator, which gives Pillow's bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from etude.kernels import resize


class Levels(NamedTuple):
    """Mean and deviation of each channel for values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Levels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Levels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = Levels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def cut_from_shorter(
    images: Tensor, shorter: int, size: int, filter: str, levels: Levels, dtype: torch.dtype
) -> Tensor:
    """The shorter side to `shorter` pixels, then a square of `size` from the centre.

    As torchvision's Resize and CenterCrop: the longer side is rounded down, and half a pixel of
    the crop's place goes to the even number.

    Args:
        images: (B, H, W, 3) uint8.
        filter: "bicubic" or "bilinear", both antialiased.

    Returns:
        (B, 3, size, size) of `dtype`, channels last.
    """
    least = min(images.shape[1:3])
    height, width = (shorter * side // least for side in images.shape[1:3])
    if (height, width) != tuple(images.shape[1:3]):
        images = resize(images, (height, width), filter=filter)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return normalised(images[:, top : top + size, left : left + size], size, filter, levels, dtype)


def normalised(
    images: Tensor, size: int, filter: str, levels: Levels, dtype: torch.dtype
) -> Tensor:
    """The whole picture brought to a square of `size` and normalised; see `cut_from_shorter`."""
    return resize(
        images,
        (size, size),
        filter=filter,
        mean=levels.mean,
        std=levels.std,
        dtype=dtype,
        out_layout="channels_last",
    )


def largest_square(images: Tensor) -> Tensor:
    """The square in the centre (B, S, S, C) of pictures (B, H, W, C), S the shorter side."""
    height, width = images.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, top : top + side, left : left + side]
