"""Inception-v3 of the TensorFlow graph inception-2015-12-05, and the same folded for speed.

Called by inception.py. What sets this network apart from other Inception-v3 (Szegedy et al. 2016):
convolutions without bias, batch normalisation without scale and with epsilon 0.001, average pools
that leave out the padding, and a max pool in the last block.

`fold` puts every batch normalisation into its convolution, in float64. A folded network also pools
after the 1 x 1 convolution of a pooled branch instead of before, over fewer channels: both are
linear and the mean leaves out the padding, so they commute. On a CPU its convolutions are oneDNN's
with the ReLU inside and weights laid out once, and the first layers, whose activations are the
largest, run on a few pictures at a time so that these stay in the cache.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 0.001
STEM_PICTURES = 2  # that go through the first layers together on a CPU
POOL3 = 2048


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
        self.register_parameter("bias", None)
        for name in ("beta", "mean", "var"):
            self.register_buffer(name, torch.zeros(outputs))
        self.stride = (stride, stride)
        self.padding = (height // 2, width // 2) if padding is None else (padding, padding)
        self._packed: Tensor | None = None

    @property
    def folded(self) -> bool:
        """Whether the normalisation is part of the weights."""
        return self.bias is not None

    def fold(self) -> None:
        """Put the normalisation into weight and bias, computed in float64."""
        scale = (self.var.double() + EPSILON).rsqrt()
        bias = self.beta.double() - self.mean.double() * scale
        weight = self.weight.double() * scale[:, None, None, None]
        self.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        self.bias = nn.Parameter(bias.to(self.weight.dtype), requires_grad=False)
        del self.beta, self.mean, self.var

    def convert(self, dtype: torch.dtype) -> None:
        """Round the weights; the bias, which is added in float32 on a CPU, keeps its digits."""
        self.weight.data, self._packed = self.weight.data.to(dtype), None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H', W')."""
        if self.folded:
            return self._folded(x, "relu")
        x = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return F.relu(F.batch_norm(x, self.mean, self.var, None, self.beta, eps=EPSILON))

    def of_mean(self, x: Tensor) -> Tensor:
        """Itself of the 3 x 3 mean of x; a folded one, of 1 x 1, is faster the other way round."""
        if self.folded:
            return F.relu_(_mean3(self._folded(x, "none")))
        return self(_mean3(x))

    def _folded(self, x: Tensor, activation: str) -> Tensor:
        if _fuses(x):
            if self._packed is None:
                self._packed = torch.ops.mkldnn._reorder_convolution_weight(
                    self.weight, self.padding, self.stride, (1, 1), 1, x.shape
                )
            return torch.ops.mkldnn._convolution_pointwise(
                x, self._packed, self.bias, self.padding, self.stride, (1, 1), 1, activation, [], ""
            )
        x = F.conv2d(x, self.weight, self.bias.to(x.dtype), self.stride, self.padding)
        return F.relu_(x) if activation == "relu" else x

    def _apply(self, *args, **kwargs) -> "Convolution":
        self._packed = None  # another device or dtype
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_packed": None}  # oneDNN's own layout cannot be copied


def _fuses(x: Tensor) -> bool:
    """Whether oneDNN's fused convolution takes x; these operators of torch are not public ones."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    there = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if not there or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if x.dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return x.dtype == torch.float32


def _tower(*layers: Convolution) -> nn.Sequential:
    """A chain of convolutions under the graph's names conv, conv_1, conv_2, ..."""
    chain = nn.Sequential()
    for number, layer in enumerate(layers):
        chain.add_module(f"conv_{number}" if number else "conv", layer)
    return chain


def _mean3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Branches(nn.Module):
    """35 x 35 and 17 x 17 blocks: a convolution, two towers, and a pooled convolution."""

    def __init__(
        self, conv: Convolution, tower: nn.Module, tower_1: nn.Module, pooled: Convolution
    ) -> None:
        super().__init__()
        self.conv, self.tower, self.tower_1 = conv, tower, tower_1
        self.tower_2 = _tower(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Channels of the four branches side by side."""
        pooled = self.tower_2.conv.of_mean(x)
        return torch.cat([self.conv(x), self.tower(x), self.tower_1(x), pooled], 1)


class Reduction(nn.Module):
    """Halves the size: strided branches, in the order given, beside a max pool."""

    def __init__(self, branches: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
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

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, 8, 8) -> (B, 2048, 8, 8)."""
        one = self.tower_conv(x)
        two = self.tower_1_conv_1(self.tower_1_conv(x))
        halves = [self.tower_mixed_conv(one), self.tower_mixed_conv_1(one)]
        halves += [self.tower_1_mixed_conv(two), self.tower_1_mixed_conv_1(two)]
        pooled = self.tower_2_conv
        last = pooled(F.max_pool2d(x, 3, 1, 1)) if self.max_pool else pooled.of_mean(x)
        return torch.cat([self.conv(x), *halves, last], 1)


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
    """The network under the graph's parameter names; its classifier is called `output`.

    Args:
        classes: of the classifier, 1008 in the graph; 0 leaves it out.
    """

    def __init__(self, classes: int = 0) -> None:
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
        self.mixed_9, self.mixed_10 = Wide(1280, False), Wide(POOL3, True)
        self.output = nn.Linear(POOL3, classes) if classes else None

    def convolutions(self) -> list[Convolution]:
        """Every convolution."""
        return [module for module in self.modules() if isinstance(module, Convolution)]

    def fold(self) -> "Inception":
        """Fold every normalisation, lay weights out channels last; returns itself."""
        for convolution in self.convolutions():
            convolution.fold()
        return self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, taps: Sequence[str] = ("2048",)) -> dict[str, Tensor]:
        """Features of pictures (B, 3, 299, 299) in [-1, 1], float32 where x is at most that.

        taps: "64", "192", "768" and "2048" are means over the places after the first and second
        max pool, the last 17 x 17 block and the last block (pool3); "logits" are of the classifier,
        "logits_unbiased" without its bias; "spatial" is (B, 2023): rows, columns and the first 7
        channels of the first branch of mixed_6. Nothing beyond the last tap is computed.
        """
        wanted, found = set(taps), {}
        few = STEM_PICTURES if x.device.type == "cpu" else len(x)
        stems = [self._stem(part, taps, found) for part in x.split(max(few, 1))]
        found = {tap: torch.cat(parts) for tap, parts in found.items()}
        for number in range(11):
            if not wanted - found.keys():
                return found
            x = torch.cat(stems) if number == 0 else x
            x = getattr(self, f"mixed_{number}" if number else "mixed")(x)
            if number == 6 and "spatial" in taps:
                found["spatial"] = x[:, :7].permute(0, 2, 3, 1).flatten(1)
            if number == 7 and "768" in taps:
                found["768"] = _places(x)
        pool3 = _places(x)
        if "2048" in taps:
            found["2048"] = pool3
        if "logits" in taps or "logits_unbiased" in taps:
            unbiased = F.linear(pool3, self.output.weight)
            found |= {"logits": unbiased + self.output.bias, "logits_unbiased": unbiased}
        return {tap: found[tap] for tap in taps}

    def _stem(self, x: Tensor, taps: Sequence[str], found: dict[str, list[Tensor]]) -> Tensor:
        """(B, 3, 299, 299) -> (B, 192, 35, 35); the taps on the way are appended to `found`."""
        x = F.max_pool2d(self.conv_2(self.conv_1(self.conv(x))), 3, 2)
        if "64" in taps:
            found.setdefault("64", []).append(_places(x))
        if set(taps) == {"64"}:
            return x
        x = F.max_pool2d(self.conv_4(self.conv_3(x)), 3, 2)
        if "192" in taps:
            found.setdefault("192", []).append(_places(x))
        return x


def _places(x: Tensor) -> Tensor:
    """Mean over the places, in float32 or float64."""
    return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
