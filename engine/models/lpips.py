"""LPIPS v0.1, a learned distance between pictures (Zhang et al. 2018); frozen, and differentiable.

Called by training, as the perceptual loss of an autoencoder; metrics may use it as well. With
y_l(x) the activations of a frozen classifier after its l-th stage, scaled at every place to unit
length over the channels, and non-negative weights w_l per channel,

    d(x, x') = sum_l mean over places of sum_c w_lc (y_l(x) - y_l(x'))_c^2

`etude data fetch lpips` writes both files of weights; nothing here reaches the network.
"""

import hashlib
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from etude.core.errors import UserError

from .blocks import seeded

# Convolutions (channels, kernel, stride, padding); "pool" halves, "look" taps the activations.
_VGG16 = [
    *[(64, 3, 1, 1)] * 2, "look", "pool", *[(128, 3, 1, 1)] * 2, "look", "pool",
    *[(256, 3, 1, 1)] * 3, "look", "pool", *[(512, 3, 1, 1)] * 3, "look", "pool",
    *[(512, 3, 1, 1)] * 3, "look",
]  # fmt: skip
_ALEXNET = [
    (64, 11, 4, 2), "look", "pool", (192, 5, 1, 2), "look", "pool",
    (384, 3, 1, 1), "look", (256, 3, 1, 1), "look", (256, 3, 1, 1), "look",
]  # fmt: skip
_PLANS = {"vgg16": _VGG16, "alexnet": _ALEXNET}
_POOL = {"vgg16": 2, "alexnet": 3}  # side of the pooling window; its stride is 2
SMALLEST = {"vgg16": 16, "alexnet": 31}  # pixels of a side that leave one place at the last stage
_NAMES = {"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}  # in the file of weights

# Of the tensors, by name in sorted order.
KNOWN_SHA256 = {
    "vgg16": "aee6c9dcc95d9ba98e1529bb7bdcfcaa6a5d7d8a70c0cd9643985f933930aff7",
    "alexnet": "9a00f7a758e5990161d1f38e25f39b66f008bffa07b7d833870ae3f1ed0e6731",
}

# The pictures' mean and deviation that the classifiers were trained with, for values in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Distances (B,) of pictures (B, C, H, W) in [-1, 1], C 3 or 1; computed in float32.

    Weights are random, a function of `seed`, until `from_file` has filled them.

    Attributes:
        weights_sha256: of the tensors that were loaded; "" for random weights.
        known: whether they are those of LPIPS v0.1.
    """

    def __init__(self, network: Literal["vgg16", "alexnet"] = "vgg16", *, seed: int = 0) -> None:
        super().__init__()
        self.network, self.weights_sha256, self.known = network, "", False
        self._plan = _PLANS[network]
        self.convs, self.heads = nn.ModuleList(), nn.ParameterList()
        width = 3
        with seeded(seed):
            for entry in self._plan:
                if entry == "look":
                    self.heads.append(nn.Parameter(torch.rand(1, width, 1, 1) / width))
                elif entry != "pool":
                    channels, kernel, stride, padding = entry
                    self.convs.append(nn.Conv2d(width, channels, kernel, stride, padding))
                    width = channels
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def from_file(cls, path: str | Path) -> "LPIPS":
        """The distance whose weights a safetensors file of `etude data fetch lpips` holds.

        Raises:
            UserError: there is no such file, or it holds something else.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no LPIPS weights at {path}; type: etude data fetch lpips")
        try:
            found = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is not a safetensors file ({error}); fetch it again") from None
        network = next((n for n, own in _NAMES.items() if f"{own}.Conv_0.kernel" in found), None)
        if network is None:
            raise UserError(f"{path} holds no LPIPS weights; type: etude data fetch lpips")
        model = cls(network)
        wanted = {n: tensor.shape for n, tensor in model.to_file().items()}
        if {n: tensor.shape for n, tensor in found.items()} != wanted:
            raise UserError(f"{path} is not LPIPS on {network}; type: etude data fetch lpips")
        for name, tensor in model.to_file().items():
            tensor.copy_(found[name])
        model.weights_sha256 = _sha256(found)
        model.known = KNOWN_SHA256[network] == model.weights_sha256
        return model

    def to_file(self) -> dict[str, Tensor]:
        """The weights under the names of the file (live views)."""
        own, tensors = _NAMES[self.network], {}
        for i, conv in enumerate(self.convs):
            tensors[f"{own}.Conv_{i}.kernel"] = conv.weight.detach()
            tensors[f"{own}.Conv_{i}.bias"] = conv.bias.detach()
        for i, head in enumerate(self.heads):
            tensors[f"NetLinLayer_{i}.Conv_0.kernel"] = head.detach()
        return tensors

    def features(self, images: Tensor) -> list[Tensor]:
        """Activations (B, c, h, w) of each stage, of unit length over the channels (or zero)."""
        x = (images.float().expand(-1, 3, -1, -1) - self.shift) / self.scale
        convs, found = iter(self.convs), []
        for entry in self._plan:
            if entry == "pool":
                x = F.max_pool2d(x, _POOL[self.network], 2)
            elif entry == "look":
                # unlike a square root of a sum, this norm has a finite gradient at zero
                length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
                found.append(x / (length + 1e-10))
            else:
                x = F.relu(next(convs)(x))
        return found

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Distance of each picture from its target, (B,) float32; gradients reach `images` only."""
        with torch.no_grad():
            goals = self.features(target)
        found = self.features(images)
        parts = [
            ((a - b).square() * head).sum(1).mean((1, 2))
            for a, b, head in zip(found, goals, self.heads, strict=True)
        ]
        return torch.stack(parts).sum(0)


def _sha256(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()
