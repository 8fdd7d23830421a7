"""A small residual classifier for pictures of 16 to 32 pixels.

Built by `classifiers.py` as a learner of practice, and called as the extractor of digit features.
Group normalisation keeps pictures of a batch independent, so a feature does not depend on the batch
it was computed in.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from etude.core.config import Config, option

from .blocks import seeded


class ClassifierConfig(Config):
    """Shape of a classifier: one stage per entry of `channels`, each half as large as the last."""

    family: Literal["small"] = option("small", "the kind of network")
    in_channels: int = option(1, "channels of the pictures", gt=0)
    num_classes: int = option(10, "classes", gt=1)
    channels: tuple[int, ...] = option((32, 64, 128), "channels of each stage", min_length=1)
    blocks: int = option(1, "residual blocks in a stage", gt=0)
    groups: int = option(8, "groups of a normalisation; divides every entry of channels", gt=0)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, normalised before each, beside a shortcut (He et al. 2016b)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(min(groups, in_channels), in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            if stride > 1 or in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Classifier(nn.Module):
    """Pictures (B, C, S, S) in [-1, 1] to logits (B, num_classes); weights follow from `seed`."""

    def __init__(self, config: ClassifierConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with seeded(seed):
            width = config.channels[0]
            self.stem = nn.Conv2d(config.in_channels, width, 3, padding=1, bias=False)
            stages: list[nn.Module] = []
            for stage, channels in enumerate(config.channels):
                for block in range(config.blocks):
                    stride = 2 if stage > 0 and block == 0 else 1
                    stages.append(ResidualBlock(width, channels, stride, config.groups))
                    width = channels
            self.stages = nn.Sequential(*stages)
            self.norm = nn.GroupNorm(config.groups, width)
            self.num_features = width
            self.head = nn.Linear(width, config.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Pictures (B, C, S, S) in [-1, 1] to the penultimate features (B, channels[-1])."""
        h = self.stages(self.stem(x))
        return F.silu(self.norm(h)).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
