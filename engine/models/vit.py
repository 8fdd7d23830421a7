"""ViT, the vision transformer (Dosovitskiy et al. 2021, "An image is worth 16 x 16 words").

Built by `classifiers.py` as a learner of practice. A class token stands before the patches' tokens,
learned positions are added to all, and a block is

    x <- x + Attention(LN(x));  x <- x + MLP(LN(x))

with the exact GELU and LN's epsilon 1e-6; the head reads the normalised class token. Names and
shapes of the state dict are those of timm's `vit_*_patch16_224`, and the parameter counts are the
published ones (86,567,656 for ViT-B/16 with 1000 classes, 22,050,664 for ViT-S/16).

Weights start as published for training from scratch: linear maps from a normal of spread 0.02 cut
off at 2, the patches' from one of spread 1 / sqrt(inputs), positions from a normal of spread 0.02;
biases and the class token at zero.
"""

import math
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from etude.core.config import Config, option
from etude.kernels import mlp

from .blocks import Attention, Mlp, PatchEmbed, seeded

PRESETS = {  # the published sizes
    "s": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "b": {"hidden_size": 768, "depth": 12, "num_heads": 12},
}


class ViTConfig(Config):
    """Shape of a ViT; `preset` fills width, depth and heads of a published size."""

    family: Literal["vit"] = option("vit", "the kind of network")
    preset: Literal["", "s", "b"] = option("", "ViT-S or ViT-B; empty: the fields below")
    in_channels: int = option(3, "channels of the pictures", gt=0)
    num_classes: int = option(1000, "classes", gt=1)
    input_size: int = option(224, "height and width of the pictures", unit="pixels", gt=0)
    patch_size: int = option(16, "height and width of a token", unit="pixels", gt=0)
    hidden_size: int = option(384, "width of the residual stream", gt=0)
    depth: int = option(12, "number of blocks", gt=0)
    num_heads: int = option(6, "attention heads", gt=0)
    mlp_ratio: float = option(4.0, "inner width of the MLP over hidden_size", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        """Contradictions of the preset are refused."""
        preset = data.get("preset", "") if isinstance(data, dict) else ""
        sizes = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        for name, value in sizes.items():
            if data.get(name, value) != value:
                raise ValueError(
                    f"{name}={data[name]} contradicts preset {preset} ({name}={value}): leave out "
                    f"{name}, or the preset"
                )
        return data | sizes if sizes else data

    @model_validator(mode="after")
    def _check(self) -> "ViTConfig":
        if self.input_size % self.patch_size:
            raise ValueError(
                f"input_size={self.input_size} is not a multiple of patch_size={self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}"
            )
        return self


class ExactMlp(Mlp):
    """The two-layer perceptron with the exact GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return mlp(
            x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, approximate="none"
        )


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to the stream (B, N, D)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = ExactMlp(width, int(config.mlp_ratio * width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Pictures (B, C, S, S) to logits (B, num_classes); weights follow from `seed`.

    S is the configuration's `input_size`: the positions are learned for it.
    """

    def __init__(self, config: ViTConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        width, tokens = config.hidden_size, (config.input_size // config.patch_size) ** 2
        with seeded(seed):
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.pos_embed = nn.Parameter(torch.empty(1, tokens + 1, width))
            self.patch_embed = PatchEmbed(config.in_channels, config.patch_size, width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.head = nn.Linear(width, config.num_classes)
            self._draw()
        self.num_features = width

    def _draw(self) -> None:
        nn.init.normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _draw_cut(module.weight, 0.02)
                nn.init.zeros_(module.bias)
        patches = self.patch_embed.proj
        _draw_cut(patches.weight, 1.0 / math.sqrt(patches.weight[0].numel()))
        nn.init.zeros_(patches.bias)

    def features(self, x: Tensor) -> Tensor:
        """Pictures (B, C, S, S) to the normalised class token (B, hidden_size)."""
        size = self.config.input_size
        if x.shape[-2:] != (size, size):
            raise ValueError(
                f"this ViT sees pictures of {size} x {size} pixels, not {x.shape[-1]} x "
                f"{x.shape[-2]}: resize them, or build it with another input_size"
            )
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def _draw_cut(weight: Tensor, spread: float) -> None:
    """A normal of this spread, drawn again beyond two of them."""
    nn.init.trunc_normal_(weight, std=spread, a=-2.0 * spread, b=2.0 * spread)
