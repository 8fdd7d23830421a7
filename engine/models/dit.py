"""DiT, the class-conditional diffusion transformer with adaLN-Zero (Peebles and Xie 2023).

Called by training and sampling through a denoiser. Each block computes, with c = time + label,

    x <- x + gate_1 * Attention(LN(x) (1 + scale_1) + shift_1)
    x <- x + gate_2 * MLP(LN(x) (1 + scale_2) + shift_2)

where the six vectors are a linear map of SiLU(c) that starts at zero, so a new network is the
identity followed by a final layer that returns zero. State-dict names and the parameter count are
those of the published models (675,129,632 for DiT-XL/2 at 32 x 32 with learned sigma).

The residual stream is fused: a block hands on its last branch not yet added, and the next block
adds it in the same pass that normalises (`gate_residual_adaln`).
"""

from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from etude.core.config import Config, option
from etude.kernels import adaln_modulate, gate_residual_adaln

from .blocks import (
    Attention,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    modulation,
    positions_2d,
    seeded,
    unpatchify,
)

SIZES = {  # depth, hidden size, heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PRESETS = {
    f"DiT-{size}/{patch}": {
        "depth": depth,
        "hidden_size": hidden,
        "num_heads": heads,
        "patch_size": patch,
    }
    for size, (depth, hidden, heads) in SIZES.items()
    for patch in (2, 4, 8)
}
Preset = Literal[tuple(["", *PRESETS])]  # type: ignore[valid-type]

# x (B, N, D), the last branch (B, N, D) and its gate (B, D), not yet added to x.
Stream = tuple[Tensor, Tensor | None, Tensor | None]


class DiTConfig(Config):
    """Shape of a DiT; `preset` fills the four sizes of a published model."""

    preset: Preset = option("", "a published size such as DiT-XL/2; empty: the fields below")
    input_size: int = option(32, "height and width of the latents", unit="pixels", gt=0)
    patch_size: int = option(2, "height and width of a token", unit="pixels", gt=0)
    in_channels: int = option(4, "channels of the latents", gt=0)
    hidden_size: int = option(384, "width of the residual stream", gt=0, multiple_of=4)
    depth: int = option(12, "number of blocks", gt=0)
    num_heads: int = option(6, "attention heads", gt=0)
    mlp_ratio: float = option(4.0, "inner width of the MLP over hidden_size", gt=0)
    num_classes: int = option(1000, "classes; label num_classes means none", ge=0)
    learn_sigma: bool = option(True, "also return a variance for every channel")
    activation_checkpointing: bool = option(
        False, "recompute each block in the backward pass to save memory", affects_result=False
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        sizes = PRESETS.get(data.get("preset") or "") if isinstance(data, dict) else None
        if not sizes:
            return data
        for name, value in sizes.items():
            if data.get(name, value) != value:
                raise ValueError(
                    f"{name}={data[name]} contradicts preset {data['preset']} ({name}={value}):"
                    f" leave out {name}, or the preset"
                )
        return data | sizes

    @model_validator(mode="after")
    def _check(self) -> "DiTConfig":
        if self.input_size % self.patch_size:
            raise ValueError(
                f"input_size={self.input_size} is not a multiple of patch_size={self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}"
            )
        return self

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


class DiTBlock(nn.Module):
    """One transformer block on a stream whose last branch is still to be added."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = modulation(hidden_size, 6)

    def forward(self, x: Tensor, h: Tensor | None, gate: Tensor | None, c: Tensor) -> Stream:
        D = x.shape[-1]
        # Six vectors: shift_1, scale_1, the neighbours gate_1, shift_2, scale_2, and gate_2.
        vectors = self.adaLN_modulation(c).split((D, D, 3 * D, D), 1)
        x, y = add_and_modulate(x, h, gate, vectors[0], vectors[1])
        x, y = gate_residual_adaln(x, self.attn(y), modulation=vectors[2])
        return x, self.mlp(y), vectors[3]


class FinalLayer(nn.Module):
    """The last normalisation and the map from tokens to patches (B, N, P * P * C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(self, x: Tensor, h: Tensor | None, gate: Tensor | None, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        _, y = add_and_modulate(x, h, gate, shift, scale)
        return self.linear(y)


class DiT(nn.Module):
    """Denoiser with the original parameter names; the weights are a function of `seed`."""

    def __init__(self, config: DiTConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        D, grid = config.hidden_size, config.input_size // config.patch_size
        with seeded(seed):
            self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, D)
            self.t_embedder = TimestepEmbedder(D)
            self.y_embedder = LabelEmbedder(config.num_classes, D)
            self.pos_embed = nn.Parameter(positions_2d(D, grid)[None], requires_grad=False)
            self.blocks = nn.ModuleList(
                DiTBlock(D, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
            )
            self.final_layer = FinalLayer(D, config.patch_size, config.out_channels)
            self._initialise()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Raw prediction for noisy latents.

        Args:
            x: (B, C, H, W) noisy latents, H = W = input_size, of any floating dtype.
            t: (B,) time times 1000, in [0, 1000]; the index of a 1000-step table as published.
            labels: (B,) int64 in [0, num_classes]; num_classes means no class.

        Returns:
            (B, C, H, W) in the parameters' dtype, or (B, 2 C, H, W) with `learn_sigma`, whose
            second half is the variance.
        """
        config = self.config
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(labels)
        stream: Stream = (tokens, None, None)
        recompute = config.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                stream = checkpoint(block, *stream, c, use_reentrant=False)
            else:
                stream = block(*stream, c)
        patches = self.final_layer(*stream, c)
        return unpatchify(patches, config.out_channels, config.patch_size)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(len(projection.weight), -1))
        nn.init.zeros_(projection.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        zero = [block.adaLN_modulation[1] for block in self.blocks]
        for layer in (*zero, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def add_and_modulate(
    x: Tensor, h: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the pending branch, if any; returns the stream and its modulated normalisation."""
    if h is None or gate is None:
        return x, adaln_modulate(x, shift, scale)
    return gate_residual_adaln(x, h, gate, shift, scale)
