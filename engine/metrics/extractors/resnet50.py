"""ResNet-50 features (He et al. 2016): torchvision's, SwAV's (Caron et al. 2020) and Keras's.

One network, whose layout of weights all three share:

    torchvision    resnet50-*.pth; shorter side to 256 (232 for its second weights, IMAGENET1K_V2)
    swav           swav_*.pth.tar, known by its prototypes and projection head, which are left out;
                   its deviation of the first channel is 0.228
    keras          what `etude data fetch resnet50` writes: strides in a block's first convolution,
                   epsilon 0.001, and levels in [0, 255] less the mean of each channel

SwAV's file with heads removed cannot be told from torchvision's: set `variant=swav`.
"""

from pathlib import Path
from typing import Literal

import torch

from etude.core.errors import UserError
from etude.models.resnet import Bottleneck, ResNet, ResNetConfig

from .base import extractor
from .convnet import ConvNet
from .preparing import IMAGENET, Levels
from .weights import read_tensors, renamed

_MEANS = (123.68, 116.779, 103.939)  # of red, green and blue, in [0, 255]
LEVELS = {
    "torchvision": IMAGENET,
    "swav": Levels(IMAGENET.mean, (0.228, 0.224, 0.225)),
    "keras": Levels(tuple(mean / 255 for mean in _MEANS), (1 / 255,) * 3),
}
_HEADS = ("projection_head", "prototypes")


@extractor("resnet50")
class ResNet50(ConvNet):
    """The mean over the last map's places (2048), and the logits where the file has them.

    Args:
        weights: the file, or the folder that holds it alone.
        variant: whose weights they are; by default what the file says.
        shorter: pixels that the shorter side is brought to before 224 are cut; 0: 256.
    """

    def __init__(
        self,
        weights: Path,
        variant: Literal["", "torchvision", "swav", "keras"] = "",
        shorter: int = 0,
    ) -> None:
        super().__init__()
        state, notes = read_tensors(weights, "ResNet-50")
        said = notes.get("variant", "")
        if not said and any(name.startswith(_HEADS) for name in state):
            said = "swav"
        self.variant = variant or said or "torchvision"
        if self.variant not in LEVELS:
            raise UserError(f"there is no variant {self.variant!r}; choose {', '.join(LEVELS)}")
        if variant and said not in ("", variant):
            raise UserError(f"{weights} is of variant {said}, not {variant}; leave out variant")
        classes = len(state["fc.bias"]) if "fc.bias" in state else 0
        with torch.device("meta"):
            self.network = ResNet(ResNetConfig(depth=50, num_classes=max(classes, 2)))
        self.head, self.network.fc = self.network.fc if classes else None, torch.nn.Identity()
        if self.variant == "keras":
            _strides_first(self.network)
        state = renamed(state, (("fc.", "head."), ("", "network.")))
        self._fill(state, weights, [f"network.{head}" for head in _HEADS])
        self.taps = {"pool": self.network.num_features} | ({"logits": classes} if classes else {})
        self.levels = LEVELS[self.variant]
        self._set_shorter(shorter)
        self.resize += f", levels of {self.variant}"


def _strides_first(network: ResNet) -> None:
    """Keras's ResNet-50: the stride in a block's first convolution, and epsilon 0.001."""
    for module in network.modules():
        if isinstance(module, Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3
