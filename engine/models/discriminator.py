"""A discriminator of patches (Isola et al. 2017), and the losses of the game played with it.

Called by the training of autoencoders. Strided convolutions turn a picture into a map of logits,
each of which judges one patch (70 x 70 pixels with three layers): above zero means real. With
logits r of pictures and f of reconstructions, averaged over the map,

    hinge          discriminator: (max(0, 1 - r) + max(0, 1 + f)) / 2     generator: -f
    nonsaturating  discriminator: (softplus(-r) + softplus(f)) / 2        generator: softplus(-f)

(Lim and Ye 2017; Goodfellow et al. 2014; the halves are those of Esser et al. 2021.)
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from etude.core.config import Config, option

from .blocks import seeded

Game = Literal["hinge", "nonsaturating"]


class DiscriminatorConfig(Config):
    """Shape of a patch discriminator."""

    channels: int = option(64, "channels after the first convolution", gt=0)
    layers: int = option(3, "convolutions that halve the picture", gt=0)
    norm: Literal["group", "batch"] = option(
        "group",
        "normalisation; batch statistics (as published) depend on how a step is split over ranks "
        "and micro batches, those of groups do not",
    )
    groups: int = option(32, "groups of a group normalisation; divides every width", gt=0)

    @model_validator(mode="after")
    def _groups_divide(self) -> "DiscriminatorConfig":
        if self.norm == "batch" and self.differs("groups"):
            raise ValueError("groups has no effect with norm: batch; leave it out")
        if self.norm == "group" and any(width % self.groups for width in self.widths[1:]):
            raise ValueError(
                f"groups={self.groups} does not divide every width of {self.widths[1:]}; "
                "lower groups or raise channels"
            )
        return self

    @property
    def widths(self) -> list[int]:
        """Channels after every convolution but the last; at most eight times the first."""
        return [self.channels * min(2**i, 8) for i in range(self.layers + 1)]

    @property
    def smallest(self) -> int:
        """Pixels of a side that leave one logit."""
        return 3 * 2**self.layers


class PatchDiscriminator(nn.Module):
    """Pictures (B, C, H, W) in [-1, 1] to logits (B, 1, h, w); weights follow from `seed`."""

    def __init__(self, config: DiscriminatorConfig, in_channels: int = 3, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        first, *widths = config.widths
        layers: list[nn.Module] = [nn.Conv2d(in_channels, first, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, width in enumerate(widths):
            stride = 2 if i < config.layers - 1 else 1
            layers.append(nn.Conv2d(first, width, 4, stride, 1, bias=False))
            layers += [_norm(config, width), nn.LeakyReLU(0.2)]
            first = width
        layers.append(nn.Conv2d(first, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        with seeded(seed):
            self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.to(self.layers[0].weight.dtype))


def _norm(config: DiscriminatorConfig, width: int) -> nn.Module:
    if config.norm == "group":
        return nn.GroupNorm(config.groups, width)
    return nn.BatchNorm2d(width, track_running_stats=False)


def discriminator_loss(real: Tensor, fake: Tensor, game: Game = "hinge") -> Tensor:
    """What the discriminator minimises, (B,) float32, of logits (B, 1, h, w) of both kinds."""
    real, fake = real.float(), fake.float()
    if game == "hinge":
        sides = F.relu(1.0 - real), F.relu(1.0 + fake)
    else:
        sides = F.softplus(-real), F.softplus(fake)
    return 0.5 * (sides[0].flatten(1).mean(1) + sides[1].flatten(1).mean(1))


def generator_loss(fake: Tensor, game: Game = "hinge") -> Tensor:
    """What a reconstruction should minimise to pass for real, (B,) float32."""
    fake = fake.float()
    return (-fake if game == "hinge" else F.softplus(-fake)).flatten(1).mean(1)
