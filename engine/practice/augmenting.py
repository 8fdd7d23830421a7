"""From a pool's pictures to what the learner's network sees; called by learner.py.

The order is that of common recipes: crop or shift, mirror, RandAugment, all on bytes; then levels,
the network's size and its normalisation; then erasing, and mixing, which learner.py does last.
Everything is a function of (seed, position). The size and the normalisation are those of
`Prepared`, through which guidance and evaluation see the network.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.data.cropping import (
    crop_boxes,
    erase_boxes,
    erased,
    mirrored,
    resized_crops,
    shifted,
)
from etude.data.randaugment import randaugment

from .learner_config import LearnerConfig


class Prepared(nn.Module):
    """A classifier behind its preprocessing: pictures of any size in [-1, 1] to logits (B, K).

    Pictures (B, C, H, W) float32 are brought to the network's size (bilinear, antialiased) and
    normalisation; both are differentiable. Logits are float32.

    Attributes:
        network: the classifier.
    """

    def __init__(self, network: nn.Module, config: LearnerConfig) -> None:
        super().__init__()
        self.network = network
        self.side, self.mean, self.std = config.side, config.mean, config.std

    def prepare(self, pictures: Tensor) -> Tensor:
        """What the network sees, (B, C, side, side) float32, of pictures in [-1, 1]."""
        side = self.side
        if side and pictures.shape[-2:] != (side, side):
            pictures = F.interpolate(
                pictures, (side, side), mode="bilinear", antialias=True, align_corners=False
            )
        return normalised(pictures, self.mean, self.std)

    def forward(self, pictures: Tensor) -> Tensor:
        seen = self.prepare(pictures)
        weight = next(self.network.parameters(), seen)
        return self.network(seen.to(weight.dtype)).float()


def normalised(
    pictures: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    """((x + 1) / 2 - mean) / std of pictures (B, C, H, W) in [-1, 1]; as they are without both."""
    if mean is None or std is None:
        return pictures
    # One multiplication and one addition: x / (2 std) + (1/2 - mean) / std.
    middle, spread = np.broadcast_arrays(np.asarray(mean, float), np.asarray(std, float))
    scale, offset = (
        torch.tensor(values, dtype=pictures.dtype, device=pictures.device)[:, None, None]
        for values in (0.5 / spread, (0.5 - middle) / spread)
    )
    return pictures * scale + offset


def augment(images: Tensor, positions: np.ndarray, config: LearnerConfig, seed: int) -> Tensor:
    """Pictures (B, C, H, W) uint8 as the stream's positions (B,) int64 change them, uint8.

    Cropped ones have the network's side, or their own where it has none.
    """
    size = (images.shape[2], images.shape[3])
    if config.crop_scale is not None:
        boxes = crop_boxes(positions, seed, size, config.crop_scale, config.ratio)
        images = resized_crops(images, boxes, config.side or size[0])
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
    levels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)
    levels = augment(levels, positions, config, seed)
    pictures = prepared.prepare(levels.float() / 127.5 - 1.0)
    if config.erase:
        boxes = erase_boxes(positions, seed, tuple(pictures.shape[2:]), config.erase)
        pictures = erased(pictures, boxes)
    return pictures
