"""ConvNeXt features (Liu et al. 2022) with torchvision's weights, tiny to large by their shapes.

A block is a 7 x 7 convolution of each channel, a normalisation over the channels, two linear maps
with the exact GELU between them, and a scale per channel, added to the stream. What the classifier
reads is the mean over the last map's places, normalised.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from etude.kernels import mlp

from .base import extractor
from .convnet import ConvNet
from .weights import parts, read_tensors, renamed

# Blocks of each stage and first width -> the shorter side that torchvision published it with.
_SHORTER = {
    ((3, 3, 9, 3), 96): 236,  # tiny
    ((3, 3, 27, 3), 96): 230,  # small
    ((3, 3, 27, 3), 128): 232,  # base
    ((3, 3, 27, 3), 192): 232,  # large
}


class _Block(nn.Module):
    """One block of a stage, channels last: (B, H, W, C) in and out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.empty(width, 1, 1))
        block: list[nn.Module] = [nn.Conv2d(width, width, 7, padding=3, groups=width)]
        block += [nn.Identity(), nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * width)]
        self.block = nn.Sequential(*block, nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        conv, _, norm, wide, _, narrow = self.block
        y = norm(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        y = mlp(y, wide.weight, wide.bias, narrow.weight, narrow.bias, approximate="none")
        return x + y * self.layer_scale[:, 0, 0]


class ConvNeXtNetwork(nn.Module):
    """Everything before the classifier, under torchvision's names (`features` is `layers`)."""

    def __init__(self, depths: tuple[int, ...], width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage, depth in enumerate(depths):
            first = nn.Conv2d(3, width, 4, 4) if stage == 0 else nn.Conv2d(width // 2, width, 2, 2)
            norm = nn.LayerNorm(width if stage == 0 else width // 2, eps=1e-6)
            layers.append(nn.Sequential(*((first, norm) if stage == 0 else (norm, first))))
            layers.append(nn.Sequential(*(_Block(width) for _ in range(depth))))
            width *= 2
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width // 2, eps=1e-6)

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the mean over the last map's places, normalised, (B, 8 width)."""
        stem, *rest = self.layers
        x = stem[1](stem[0](x).permute(0, 2, 3, 1))
        for number, layer in enumerate(rest):
            if number % 2:  # a normalisation and a convolution of stride 2
                x = layer[1](layer[0](x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            else:
                x = layer(x)
        return self.norm(x.mean((1, 2)))


@extractor("convnext")
class ConvNeXt(ConvNet):
    """The pooled, normalised features (768 to 1536) and the logits.

    Args:
        weights: the file, or the folder that holds it alone.
        shorter: pixels that the shorter side is brought to before 224 are cut; 0: torchvision's
            for this size, 230 to 236.
    """

    def __init__(self, weights: Path, shorter: int = 0) -> None:
        super().__init__()
        state, _ = read_tensors(weights, "ConvNeXt")
        depths, width = _shape(state)
        classes = len(state.get("classifier.2.bias", ())) or 1000
        with torch.device("meta"):
            self.network = ConvNeXtNetwork(depths, width)
            self.head = nn.Linear(8 * width, classes)
        names = (
            ("features.", "network.layers."),
            ("classifier.0.", "network.norm."),
            ("classifier.2.", "head."),
        )
        self._fill(renamed(state, names), weights)
        self.taps = {"pool": 8 * width, "logits": classes}
        self._set_shorter(shorter or _SHORTER.get((depths, width), 232))


def _shape(state: dict[str, Tensor]) -> tuple[tuple[int, ...], int]:
    """Blocks of each stage and the first width; what is no ConvNeXt's is refused later."""
    stages = [parts(state, f"features.{stage}.") for stage in (1, 3, 5, 7)]
    depths = tuple(len({name.split(".")[0] for name in stage}) for stage in stages)
    return depths, len(state.get("features.0.0.bias", (0,) * 96))
