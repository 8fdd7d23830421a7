"""From a pool's pictures to what the learner's network sees; called by learner.py.

The order is that of common recipes: crop or shift, mirror, RandAugment, all on bytes; then levels,
the network's size and its normalisation; then erasing, and mixing, which learner.py does last.
Everything is a function of (seed, position). The size and the normalisation are those of
`Prepared`, through which guidance and evaluation see the network.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from etude.data.cropping import (
    crop_boxes,
    erase_boxes,
    erased,
    mirrored,
    resized_crops,
    resizing_weights,
    shifted,
)
from etude.data.randaugment import randaugment
from etude.data.upload import to_device
from etude.models.batchnorm import WideBuffers

from .learner_config import LearnerConfig


class Prepared(WideBuffers):
    """A classifier behind its preprocessing: pictures of any size in [-1, 1] to logits (B, K).

    Pictures (B, C, H, W) are brought to the network's size (bilinear, antialiased) and
    normalisation; both are differentiable, and in float32 under autocast too. Logits are float32.

    Attributes:
        network: the classifier.
        side: pixels along a side of what it sees; 0: of the pictures as they come.
    """

    def __init__(self, network: nn.Module, config: LearnerConfig) -> None:
        super().__init__()
        self.network = network
        self.side = config.side
        scale, offset = _line(config.mean, config.std)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def prepare(self, pictures: Tensor) -> Tensor:
        """What the network sees, (B, C, side, side) float32, of pictures in [-1, 1]."""
        with torch.autocast(pictures.device.type, enabled=False):
            pictures = pictures.to(torch.promote_types(pictures.dtype, torch.float32))
            if self.side and pictures.shape[-2:] != (self.side, self.side):
                pictures = _resized(pictures, self.side)
            if self.scale is None:
                return pictures
            return pictures * self.scale + self.offset

    def forward(self, pictures: Tensor) -> Tensor:
        seen = self.prepare(pictures)
        weight = next(self.network.parameters(), seen)
        return self.network(seen.to(weight.dtype)).float()


def _line(
    mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and offset, (1 or C, 1, 1) float32, of ((x + 1) / 2 - mean) / std; None without both.

    That is one multiplication and one addition: x / (2 std) + (1/2 - mean) / std.
    """
    if mean is None or std is None:
        return None, None
    middle, spread = np.broadcast_arrays(np.asarray(mean, float), np.asarray(std, float))
    scale, offset = 0.5 / spread, (0.5 - middle) / spread
    return tuple(torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (scale, offset))


def _resized(pictures: Tensor, side: int) -> Tensor:
    """Pictures (B, C, H, W) brought to (B, C, side, side), as `F.interpolate` does it.

    By two products of matrices, whose gradients repeat to the bit: those of `F.interpolate` are
    added up in no fixed order on a GPU.
    """
    device = pictures.device
    down, across = (
        resizing_weights(
            torch.zeros(1, device=device), torch.full((1,), extent, device=device), extent, side
        )[0].to(pictures.dtype)
        for extent in pictures.shape[-2:]
    )
    return down @ (pictures @ across.T)


def augment(
    images: Tensor, positions: np.ndarray, config: LearnerConfig, seed: int, side: int = 0
) -> Tensor:
    """Pictures (B, C, H, W) uint8 as the stream's positions (B,) int64 change them, uint8.

    Args:
        side: of cropped ones, in pixels; 0: the height that they had.
    """
    size = (images.shape[2], images.shape[3])
    if config.crop_scale is not None:
        boxes = crop_boxes(positions, seed, size, config.crop_scale, config.ratio)
        images = resized_crops(images, boxes, side or size[0])
    elif config.shift:
        images = shifted(images, positions, config.shift, seed)
    if config.flip:
        images = mirrored(images, positions, seed)
    if config.randaugment.num_ops:
        images = randaugment(images, positions, seed, config.randaugment)
    return images


def seen_in_training(
    images: np.ndarray,
    positions: np.ndarray,
    prepared: Prepared,
    config: LearnerConfig,
    seed: int,
    device: torch.device,
) -> Tensor:
    """What the network sees of pictures (B, S, S, C) uint8 in a step, but for mixing: float32."""
    levels = to_device(images, device).permute(0, 3, 1, 2)
    levels = augment(levels, positions, config, seed, prepared.side)
    pictures = prepared.prepare(levels.float() / 127.5 - 1.0)
    if config.erase:
        boxes = erase_boxes(positions, seed, tuple(pictures.shape[2:]), config.erase)
        pictures = erased(pictures, boxes)
    return pictures
