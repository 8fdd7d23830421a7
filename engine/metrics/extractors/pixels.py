"""Pixels as features, for distances to the nearest training picture; no network, no weights."""

import torch

from . import resize_antialiased, to_channels


class PixelExtractor:
    """Grey or colour pixels in [0, 1], flattened; the Euclidean distance is then the usual one.

    Args:
        input_size: side that pictures are resized to, pixels.
        channels: 1 or 3.
    """

    name = "pixels"
    version = "1"
    weights_sha256 = ""
    resize = "bilinear, antialiased"

    def __init__(self, input_size: int, channels: int = 1) -> None:
        self.input_size, self.channels = input_size, channels
        self.dim = channels * input_size**2

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels (B, dim) float32 in [0, 1] of images (B, H, W, C) uint8."""
        x = resize_antialiased(to_channels(images, self.channels), self.input_size)
        return (x / 255.0).flatten(1)

    def to(self, device: torch.device | str) -> "PixelExtractor":
        """Nothing to move."""
        return self
