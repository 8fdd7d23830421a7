"""VGG16 features (Simonyan and Zisserman 2015): the second linear layer, or the last convolutions.

`fc2` (after its ReLU) is the space in which Kynkaanniemi et al. 2019 measure precision and recall;
it needs torchvision's whole file. The convolutions alone also come with LPIPS, whose file
`etude data fetch lpips` writes: `relu5_3` is the mean over their last map's places, for a file of
either kind. LPIPS itself compares pairs and is no feature; it is `etude.models.lpips`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from etude.core.errors import UserError
from etude.kernels import resize

from .base import extractor
from .convnet import ConvNet
from .weights import parts, read_tensors, renamed

_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: halve
_LPIPS = "VGG16_0.Conv_"


class VGG16Network(nn.Module):
    """Convolutions up to relu5_3 and, with `linear`, the layers up to fc2's ReLU."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in _WIDTHS:
            if width:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
                inputs = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.linear = (
            nn.ModuleList((nn.Linear(25088, 4096), nn.Linear(4096, 4096))) if linear else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, 224, 224) -> relu5_3 (B, 512, 14, 14) and fc2 (B, 4096)."""
        places = self.layers(x)
        if self.linear is None:
            return places, None
        y = nn.functional.max_pool2d(places, 2).contiguous().flatten(1)
        for layer in self.linear:
            y = layer(y).relu()
        return places, y


@extractor("vgg16")
class VGG16(ConvNet):
    """fc2 (4096, where the file has it), the mean of relu5_3 (512), and the logits.

    Args:
        weights: torchvision's file, or `vgg16.safetensors` of LPIPS.
        preset: "torchvision" as the weights were published; "tf1": the whole picture to 224 by
            TensorFlow 1's bilinear rule without antialiasing, as torch-fidelity has it.
        shorter: pixels that the shorter side is brought to before 224 are cut; 0: 256.
    """

    def __init__(
        self, weights: Path, preset: Literal["torchvision", "tf1"] = "torchvision", shorter: int = 0
    ) -> None:
        super().__init__()
        if preset not in ("torchvision", "tf1"):
            raise UserError(f"there is no preset {preset!r}; choose torchvision or tf1")
        if preset == "tf1" and shorter:
            raise UserError("shorter has no effect with preset=tf1; leave it out")
        inside = weights / "vgg16.safetensors"
        state, _ = read_tensors(inside if inside.is_file() else weights, "VGG16")
        linear = "classifier.0.weight" in state
        classes = len(state.get("classifier.6.bias", ()))
        with torch.device("meta"):
            self.network = VGG16Network(linear)
            self.head = nn.Linear(4096, classes) if classes else None
        self._fill(_own_names(state), weights)
        self.taps = ({"fc2": 4096} if linear else {}) | {"relu5_3": 512}
        self.taps |= {"logits": classes} if classes else {}
        self.preset = preset
        self._set_shorter(shorter)
        if preset == "tf1":
            self.resize = "bilinear of TensorFlow 1 (no antialiasing), the whole picture"

    def prepare(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Pictures (B, 3, 224, 224), normalised, channels last."""
        if self.preset == "torchvision":
            return super().prepare(images, dtype)
        mean, std = self.levels
        return resize(
            images, (224, 224), filter="tf1", mean=mean, std=std, dtype=dtype,
            out_layout="channels_last",
        )  # fmt: skip

    def forward(self, x: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """fc2 (B, 4096), relu5_3 (B, 512), logits (B, classes)."""
        places, fc2 = self.network(x)
        found = {"relu5_3": places.mean((2, 3))}
        if fc2 is not None:
            found["fc2"] = fc2
        if "logits" in taps:
            found["logits"] = self.head(fc2)
        return found


def _own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of torchvision's file, or of LPIPS's, under the network's names."""
    kernels = parts(state, _LPIPS)
    if kernels:
        places = [i for i, width in enumerate(_layer_widths()) if width]
        names = [
            (f"{number}.{old}", f"network.layers.{place}.{new}")
            for number, place in enumerate(places)
            for old, new in (("kernel", "weight"), ("bias", "bias"))
        ]
        return {new: kernels[old] for old, new in names if old in kernels}
    names = (
        ("features.", "network.layers."),
        ("classifier.0.", "network.linear.0."),
        ("classifier.3.", "network.linear.1."),
        ("classifier.6.", "head."),
    )
    return renamed(state, names)


def _layer_widths() -> list[int]:
    """Width of the layer at each place, 0 for a ReLU or a pool."""
    return [entry for width in _WIDTHS for entry in ((width, 0) if width else (0,))]
