"""ResNet, the residual network (He et al. 2016, "Deep residual learning for image recognition").

Built by `classifiers.py` as a learner of practice. Depths 18 and 34 have blocks of two 3 x 3
convolutions, depth 50 of 1 x 1, 3 x 3 and 1 x 1, with the stride in the 3 x 3 one ("v1.5", Goyal et
al. 2017). State-dict names, shapes and first weights are torchvision's, and the parameter counts
are the published ones (11,689,512 for ResNet-18 with 1000 classes, 25,557,032 for ResNet-50).

For small pictures the stem is one 3 x 3 convolution of stride 1 without pooling, as He et al. have
it for CIFAR-10. Group normalisation (Wu and He 2018) keeps pictures of a batch apart.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from etude.core.config import Config, option

from .batchnorm import BatchNorm
from .blocks import seeded

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}  # blocks of each stage


class ResNetConfig(Config):
    """Shape of a ResNet."""

    family: Literal["resnet"] = option("resnet", "the kind of network")
    in_channels: int = option(3, "channels of the pictures", gt=0)
    num_classes: int = option(1000, "classes", gt=1)
    depth: Literal[18, 34, 50] = option(18, "layers with weights")
    width: int = option(64, "channels of the first stage; each later one has twice as many", gt=0)
    stem: Literal["imagenet", "small"] = option(
        "imagenet",
        "imagenet: 7 x 7, stride 2, and pooling; small: 3 x 3, for pictures of 32 pixels",
    )
    norm: Literal["batch", "group"] = option(
        "batch", "batch: over the whole global batch, on any number of ranks; group: each picture"
    )
    groups: int | None = option(
        None, "groups of a group normalisation, which divide `width`; 32 unless given", gt=0
    )

    @model_validator(mode="after")
    def _check(self) -> "ResNetConfig":
        if self.norm == "batch" and self.groups is not None:
            raise ValueError("groups has no effect with norm: batch; remove it, or type norm=group")
        if self.norm == "group" and self.width % (self.groups or 32):
            raise ValueError(f"groups={self.groups or 32} does not divide width={self.width}")
        return self

    def normalisation(self, channels: int) -> nn.Module:
        """The layer that normalises so many channels."""
        if self.norm == "batch":
            return BatchNorm(channels)
        return nn.GroupNorm(self.groups or 32, channels)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, config: ResNetConfig, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = config.normalisation(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = config.normalisation(width)
        self.downsample = shortcut(config, inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.downsample(x))


class Bottleneck(nn.Module):
    """A 3 x 3 convolution of a quarter of the channels between two of 1 x 1, beside a shortcut."""

    expansion = 4

    def __init__(self, config: ResNetConfig, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = config.normalisation(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = config.normalisation(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = config.normalisation(4 * width)
        self.downsample = shortcut(config, inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.downsample(x))


def shortcut(config: ResNetConfig, inputs: int, outputs: int, stride: int) -> nn.Module:
    """The identity where the shape stays, else a normalised 1 x 1 convolution."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), config.normalisation(outputs)
    )


class ResNet(nn.Module):
    """Pictures (B, C, S, S) of any size to logits (B, num_classes); weights follow from `seed`."""

    def __init__(self, config: ResNetConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        block = Bottleneck if config.depth == 50 else BasicBlock
        large, width = config.stem == "imagenet", config.width
        with seeded(seed):
            self.conv1 = nn.Conv2d(
                config.in_channels, width, 7 if large else 3, 2 if large else 1,
                padding=3 if large else 1, bias=False,
            )  # fmt: skip
            self.bn1 = config.normalisation(width)
            self.maxpool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
            inputs = width
            for stage, count in enumerate(DEPTHS[config.depth]):
                blocks: list[nn.Module] = []
                for number in range(count):
                    stride = 2 if stage > 0 and number == 0 else 1
                    blocks.append(block(config, inputs, width << stage, stride))
                    inputs = (width << stage) * block.expansion
                setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            self.fc = nn.Linear(inputs, config.num_classes)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.num_features = inputs

    def features(self, x: Tensor) -> Tensor:
        """Pictures (B, C, S, S) to the mean over the last map's pixels (B, num_features)."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))
