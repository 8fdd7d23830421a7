"""MobileNetV2 features (Sandler et al. 2018) with torchvision's weights.

`etude data fetch mobilenet` writes them (`mobilenet_v2-b0353104`, IMAGENET1K_V1). Its logits are
those of a real ImageNet classifier, which an inception score needs; the network is a small one, so
such a score says its name: "mobilenet/logits".
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from .base import extractor
from .convnet import ConvNet
from .weights import read_tensors, renamed

# Widening, channels, blocks and first stride of each stage (table 2 of the paper).
_STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
    (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


class _Inverted(nn.Module):
    """Widen, a convolution of each channel, narrow without a non-linearity; added where it fits."""

    def __init__(self, inputs: int, outputs: int, stride: int, widening: int) -> None:
        super().__init__()
        inner = inputs * widening
        layers = [_unit(inputs, inner, 1)] if widening > 1 else []
        layers += [_unit(inner, inner, 3, stride, groups=inner)]
        narrow = nn.Conv2d(inner, outputs, 1, bias=False)
        self.conv = nn.Sequential(*layers, narrow, nn.BatchNorm2d(outputs))
        self.added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return x + self.conv(x) if self.added else self.conv(x)


class MobileNetV2(nn.Module):
    """Everything before the classifier, under torchvision's names."""

    def __init__(self) -> None:
        super().__init__()
        width, layers = 32, [_unit(3, 32, 3, 2)]
        for widening, channels, count, first in _STAGES:
            for number in range(count):
                layers.append(_Inverted(width, channels, 1 if number else first, widening))
                width = channels
        self.layers = nn.Sequential(*layers, _unit(width, 1280, 1))

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the mean over the last map's places (B, 1280)."""
        return self.layers(x).mean((2, 3))


def _unit(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU cut off at 6."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


@extractor("mobilenet")
class MobileNet(ConvNet):
    """The mean over the last map's places (1280) and the logits (1000).

    Args:
        weights: the file, or the folder that holds it alone.
        shorter: pixels that the shorter side is brought to before 224 are cut; 0: 256 (232 for
            torchvision's second weights, IMAGENET1K_V2).
    """

    def __init__(self, weights: Path, shorter: int = 0) -> None:
        super().__init__()
        state, _ = read_tensors(weights, "MobileNetV2")
        classes = len(state.get("classifier.1.bias", ())) or 1000
        with torch.device("meta"):
            self.network, self.head = MobileNetV2(), nn.Linear(1280, classes)
        names = (("features.", "network.layers."), ("classifier.1.", "head."))
        self._fill(renamed(state, names), weights)
        self.taps = {"pool": 1280, "logits": classes}
        self._set_shorter(shorter)
