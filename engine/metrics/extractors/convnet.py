"""What the convolutional networks of torchvision's layout share; the base of their backbones.

Their weights were published with one preprocessing: shorter side to `shorter` pixels by Pillow's
bilinear filter, a square from the centre, and the levels' mean and deviation of ImageNet.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from etude.core.errors import UserError

from .base import Backbone
from .preparing import IMAGENET, Levels, cut_from_shorter
from .weights import fill


class ConvNet(Backbone):
    """A network whose `features(x)` gives what its classifier reads.

    Attributes:
        network: the network, with `features`.
        head: the linear map to logits, where the file holds it.
        levels: mean and deviation that pictures are normalised by.
        shorter: pixels that the shorter side is brought to.
    """

    input_size = 224
    network: nn.Module
    head: nn.Module | None
    levels: Levels = IMAGENET
    shorter: int
    default_shorter: ClassVar[int] = 256

    def _fill(self, state: Mapping[str, Tensor], path: Path, ignored: Sequence[str] = ()) -> None:
        """Take the weights (`fill`), then make the network ready to run on channels-last maps."""
        self.weights_sha256 = fill(self, state, path, ignored)
        fold(self.network)
        self.network.to(memory_format=torch.channels_last)

    def _set_shorter(self, shorter: int) -> None:
        """Take an option `shorter`, 0 for the publisher's."""
        self.shorter = shorter or self.default_shorter
        if self.shorter < self.input_size:
            raise UserError(
                f"shorter={shorter} is less than the {self.input_size} pixels that the network "
                f"sees; set at least {self.input_size}"
            )
        self.resize = f"bilinear of Pillow, shorter side to {self.shorter}, cut from the centre"

    def prepare(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Pictures (B, 3, input_size, input_size), normalised, channels last."""
        return cut_from_shorter(
            images, self.shorter, self.input_size, "bilinear", self.levels, dtype
        )

    def forward(self, x: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """Pooled features (B, length) and logits (B, classes)."""
        found = {"pool": self.network.features(x)}
        if "logits" in taps:
            found["logits"] = self.head(found["pool"])
        return found


def fold(network: nn.Module) -> None:
    """Multiply every batch normalisation into the convolution before it, in place, in float64.

    Its pass over the map is saved, and in bf16 its statistics are not rounded.
    """
    for module in list(network.modules()):
        names = list(module._modules)
        for before, after in zip(names, names[1:], strict=False):
            conv, norm = module._modules[before], module._modules[after]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                made = fuse_conv_bn_eval(conv.double().eval(), norm.double().eval()).float()
                module._modules[before] = made.requires_grad_(False)
                module._modules[after] = nn.Identity()
