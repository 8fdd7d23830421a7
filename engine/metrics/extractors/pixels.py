"""Pixels as features, for distances to the nearest training picture; no network, no weights."""

from collections.abc import Sequence

import torch

from etude.core.errors import UserError

from .base import Backbone, extractor, resize_antialiased


@extractor("pixels")
class Pixels(Backbone):
    """Grey or colour pixels in [0, 1], flattened; the Euclidean distance is then the usual one.

    Args:
        input_size: side that pictures are resized to, pixels.
        channels: 1 or 3.
    """

    version = "2"  # 1 did not round the luma of colour pictures
    resize = "bilinear, antialiased"
    needs_weights = False

    def __init__(self, weights: None, input_size: int = 0, channels: int = 1) -> None:
        super().__init__()
        if input_size < 1 or channels not in (1, 3):
            raise UserError(
                "pixels has 1 or 3 channels and needs its option input_size, of at least 1 pixel"
            )
        self.input_size, self.channels = input_size, channels
        self.taps = {"pixels": channels * input_size**2}

    def prepare(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Pixels (B, channels, input_size, input_size) in [0, 1]."""
        x = resize_antialiased(images.permute(0, 3, 1, 2).float(), self.input_size)
        return (x / 255.0).to(dtype)

    def forward(self, x: torch.Tensor, taps: Sequence[str]) -> dict[str, torch.Tensor]:
        """Pixels (B, channels * input_size^2), channel after channel."""
        return {"pixels": x.flatten(1)}
