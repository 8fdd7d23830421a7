"""Features of the Inception network behind the Fréchet Inception distance (Heusel et al. 2017).

Pool3 features (2048) are the default; other taps serve the Inception score (logits), the spatial
FID and what torch-fidelity offers. Three conventions of resizing exist, whose distances differ:
`tf1` is TensorFlow 1's, of the original and of torch-fidelity; `clean` is clean-fid's; `pytorch` is
pytorch-fid's. The weights are fetched by the user (`etude data fetch inception`, without the
classifier) or are a file of pytorch-fid, torch-fidelity or NVIDIA.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from etude.core.errors import UserError
from etude.kernels import resize as resize_pictures
from etude.kernels.resizing import weights as resize_weights

from .base import Backbone, extractor
from .inception_network import POOL3
from .inception_weights import is_published_file, load_inception

SIDE = 299
RULES = {
    "tf1": "bilinear of TensorFlow 1 (no antialiasing)",
    "clean": "bicubic, antialiased, not rounded",
    "pytorch": "bilinear with centred pixels (no antialiasing), by 127.5 - 1",
}
_MIDDLE = (128 / 255,)  # as mean and as deviation: (v / 255 - mean) / std = (v - 128) / 128
_TILE = 32  # outputs that one product makes; more would multiply more zeros


@extractor("inception")
class InceptionBackbone(Backbone):
    """Inception-v3 of 2015.

    Args:
        weights: a file of the weights in any published layout, or the folder that was fetched.
        resize: "tf1", "clean" or "pytorch".
        check: whether other weights than the published ones are refused.
        fold: whether batch normalisation goes into the convolutions; the plain network, in
            channels-first memory, is there to compare with.
    """

    version = "2"  # 1 did not fold
    input_size = SIDE
    taps = {
        "2048": POOL3,
        "64": 64,
        "192": 192,
        "768": 768,
        "logits": 1008,
        "logits_unbiased": 1008,
        "spatial": 2023,
    }

    def __init__(
        self, weights: Path, resize: str = "tf1", check: bool = True, fold: bool = True
    ) -> None:
        super().__init__()
        if resize not in RULES:
            raise UserError(f"inception has no resize {resize!r}; choose one of {', '.join(RULES)}")
        self.rule, self.resize = resize, RULES[resize]
        self.network, self.weights_sha256 = load_inception(weights, check)
        self.verified = check
        has_logits = self.network.output is not None
        self._logits_verified = check and has_logits and is_published_file(weights)
        self._weights, self._layout = weights, "channels_last" if fold else "BCHW"
        if fold:
            self.network.fold()
        else:
            self.version = f"{self.version}, not folded"

    def verifies(self, tap: str) -> bool:
        """The classifier's weights are known by the whole file alone, all others by tensors."""
        return self._logits_verified if tap.startswith("logits") else self.verified

    def check(self, taps: Sequence[str]) -> None:
        """Raise UserError where logits are asked for and the file has no classifier."""
        if self.network.output is None and {"logits", "logits_unbiased"} & set(taps):
            raise UserError(
                f"{self._weights} has no classifier, so there are no logits; name pytorch-fid's or "
                f"torch-fidelity's file of weights"
            )

    def convert(self, dtype: torch.dtype) -> None:
        """The convolutions' weights alone: pool3 and logits are computed in float32."""
        for convolution in self.network.convolutions():
            convolution.convert(dtype)

    def prepare(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Pictures (B, 3, 299, 299) in [-1, 1]."""
        if self.rule == "tf1":
            return resize_pictures(
                images,
                (SIDE, SIDE),
                filter="tf1",
                mean=_MIDDLE,
                std=_MIDDLE,
                dtype=dtype,
                out_layout=self._layout,
            )
        x = images.permute(0, 3, 1, 2).float().contiguous()
        if self.rule == "clean":
            x = resize_clean(x, SIDE).sub_(128.0).div_(128.0)
        else:
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False) / 127.5 - 1.0
        channels_last = self._layout == "channels_last"
        form = torch.channels_last if channels_last else torch.contiguous_format
        return x.to(dtype, memory_format=form)

    def forward(self, x: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """Features (B, length) of each tap."""
        return self.network(x, taps)


def resize_clean(x: Tensor, size: int) -> Tensor:
    """Pillow's antialiased bicubic of float levels, (B, C, H, W) -> (B, C, size, size) in [0, 255].

    Not rounded on the way, as Pillow resamples pictures of mode F; within 2e-4 of a level of that.
    The taps are those of the resize operator. Each tile of outputs is one matrix product with the
    inputs that it reads.
    """
    x = torch.cat([x[..., a:b] @ taps.to(x.device).T for a, b, taps in _tiles(x.shape[3], size)], 3)
    x = torch.cat([taps.to(x.device) @ x[:, :, a:b] for a, b, taps in _tiles(x.shape[2], size)], 2)
    return x.clamp_(0.0, 255.0)


@lru_cache(maxsize=64)
def _tiles(inputs: int, outputs: int) -> list[tuple[int, int, Tensor]]:
    """(first input, last input + 1, taps (outputs of the tile, inputs of it) float32) by tile."""
    bounds, fixed = resize_weights("bicubic", inputs, 0.0, float(inputs), outputs)
    tiles = []
    for top in range(0, outputs, _TILE):
        starts, counts = bounds[top : top + _TILE].T
        first, last = int(starts.min()), int((starts + counts).max())
        taps = torch.zeros(len(starts), last - first, dtype=torch.float64)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            at = int(start) - first
            taps[row, at : at + count] = torch.tensor(fixed[top + row, :count]).double()
        tiles.append((first, last, (taps / taps.sum(1, keepdim=True)).float()))
    return tiles
