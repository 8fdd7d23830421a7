"""Inception-v3 with torchvision's ImageNet weights (Szegedy et al. 2016); not the network of FID.

Some libraries take it for Frechet distances and inception scores; FID means the network of
`inception.py`. The two differ in their weights, in batch normalisation (here with a scale), in
average pools (here with the padding counted), in the last block's pool (here an average) and in how
pictures are resized. The auxiliary classifier is left out. torchvision turns ImageNet's levels into
[-1, 1] inside the network; written out, that is (v / 255 - 1/2) / (1/2), which is done here.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import extractor
from .convnet import ConvNet
from .preparing import HALF
from .weights import read_tensors, renamed

_Size = int | tuple[int, int]


class _Unit(nn.Module):
    """Convolution, batch normalisation with epsilon 0.001, ReLU; `padding` None keeps the size."""

    def __init__(
        self, inputs: int, outputs: int, kernel: _Size, stride: int = 1, padding: int | None = None
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = tuple(side // 2 for side in sides) if padding is None else padding
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, around, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches side by side over the channels.

    Args:
        branches: each a chain of (name, unit), in the order of the output's channels.
        pool: "mean" before the last branch, or "max", a branch of its own, of stride 2.
        split: the last two units of a longer chain stand beside each other.
    """

    def __init__(self, branches: list[list[tuple[str, _Unit]]], pool: str, split: bool) -> None:
        super().__init__()
        self.chains = [[name for name, _ in chain] for chain in branches]
        self.pool, self.split = pool, split
        for chain in branches:
            for name, unit in chain:
                self.add_module(name, unit)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for number, chain in enumerate(self.chains):
            y = x
            if self.pool == "mean" and number == len(self.chains) - 1:
                y = F.avg_pool2d(x, 3, 1, 1)
            whole = chain[:-2] if self.split and len(chain) > 1 else chain
            for name in whole:
                y = getattr(self, name)(y)
            found += [y] if whole is chain else [getattr(self, name)(y) for name in chain[-2:]]
        if self.pool == "max":
            found.append(F.max_pool2d(x, 3, 2))
        return torch.cat(found, 1)


def _chain(name: str, inputs: int, *layers: tuple) -> list[tuple[str, _Unit]]:
    """Units `name_1`, `name_2`, ... of (outputs, kernel, stride, padding)."""
    made = []
    for number, (outputs, *rest) in enumerate(layers, start=1):
        made.append((f"{name}_{number}", _Unit(inputs, outputs, *rest)))
        inputs = outputs
    return made


def _one(name: str, inputs: int, outputs: int) -> list[tuple[str, _Unit]]:
    return [(name, _Unit(inputs, outputs, 1))]


def _block_35(inputs: int, pooled: int) -> _Mixed:
    branches = [
        _one("branch1x1", inputs, 64),
        _chain("branch5x5", inputs, (48, 1), (64, 5)),
        _chain("branch3x3dbl", inputs, (64, 1), (96, 3), (96, 3)),
        _one("branch_pool", inputs, pooled),
    ]
    return _Mixed(branches, "mean", split=False)


def _block_17(middle: int) -> _Mixed:
    across, down = (1, 7), (7, 1)
    twice = [(middle, 1), (middle, down), (middle, across), (middle, down), (192, across)]
    branches = [
        _one("branch1x1", 768, 192),
        _chain("branch7x7", 768, (middle, 1), (middle, across), (192, down)),
        _chain("branch7x7dbl", 768, *twice),
        _one("branch_pool", 768, 192),
    ]
    return _Mixed(branches, "mean", split=False)


def _block_8(inputs: int) -> _Mixed:
    three = [("branch3x3_1", _Unit(inputs, 384, 1))]
    double = _chain("branch3x3dbl", inputs, (448, 1), (384, 3))
    for chain, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3")):
        chain += [(f"{name}a", _Unit(384, 384, (1, 3))), (f"{name}b", _Unit(384, 384, (3, 1)))]
    branches = [_one("branch1x1", inputs, 320), three, double, _one("branch_pool", inputs, 192)]
    return _Mixed(branches, "mean", split=True)


def _reduction_35() -> _Mixed:
    branches = [
        [("branch3x3", _Unit(288, 384, 3, 2, 0))],
        _chain("branch3x3dbl", 288, (64, 1), (96, 3), (96, 3, 2, 0)),
    ]
    return _Mixed(branches, "max", split=False)


def _reduction_17() -> _Mixed:
    branches = [
        _chain("branch3x3", 768, (192, 1), (320, 3, 2, 0)),
        _chain("branch7x7x3", 768, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, 0)),
    ]
    return _Mixed(branches, "max", split=False)


class TorchvisionInception(nn.Module):
    """Everything before the classifier, under torchvision's names."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Unit(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = _Unit(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = _Unit(32, 64, 3)
        self.Conv2d_3b_1x1 = _Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = _Unit(80, 192, 3, 1, 0)
        blocks = {"5b": _block_35(192, 32), "5c": _block_35(256, 64), "5d": _block_35(288, 64)}
        blocks["6a"] = _reduction_35()
        blocks |= {f"6{x}": _block_17(m) for x, m in zip("bcde", (128, 160, 160, 192), strict=True)}
        blocks |= {"7a": _reduction_17(), "7b": _block_8(1280), "7c": _block_8(2048)}
        for name, block in blocks.items():
            self.add_module(f"Mixed_{name}", block)

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, 299, 299) in [-1, 1] -> the mean over the last map's places (B, 2048)."""
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, 2)
            x = layer(x)
        return x.mean((2, 3))


@extractor("inception_torchvision")
class InceptionTorchvision(ConvNet):
    """The mean over the last map's places (2048) and the logits (1000).

    Args:
        weights: the file, or the folder that holds it alone.
        shorter: pixels that the shorter side is brought to before 299 are cut; 0: 342.
    """

    input_size = 299
    default_shorter = 342
    levels = HALF

    def __init__(self, weights: Path, shorter: int = 0) -> None:
        super().__init__()
        state, _ = read_tensors(weights, "Inception-v3")
        state = {name: v for name, v in state.items() if not name.startswith("AuxLogits.")}
        classes = len(state.get("fc.bias", ())) or 1000
        with torch.device("meta"):
            self.network, self.head = TorchvisionInception(), nn.Linear(2048, classes)
        names = (("fc.", "head."), ("", "network."))
        self._fill(renamed(state, names), weights)
        self.taps = {"pool": 2048, "logits": classes}
        self._set_shorter(shorter)
