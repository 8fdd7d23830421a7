"""Building blocks shared by the denoisers: embedders, attention, MLP, final layer, first weights.

Called by every denoiser of this room. Parameter names follow the original DiT (Peebles and Xie
2023), so published weights load without a map. Shapes: B batch, N tokens, D hidden size, C
channels, P patch size.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from etude.kernels import (
    QKNorm,
    adaln_modulate,
    attention_packed,
    gate_residual_adaln,
    mlp,
    swiglu,
)
from etude.kernels.attention import Rope

# x (B, N, D), the last branch (B, N, D) and its gate (B, D), not yet added to x.
Stream = tuple[Tensor, Tensor | None, Tensor | None]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weight initialisation on the CPU as a function of `seed`; the global state is put back.

    No GPU generator is touched: build a model on the CPU, then move it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class PatchEmbed(nn.Module):
    """Latents (B, C, H, W) to tokens (B, N, D), row by row, by a convolution without overlap."""

    def __init__(self, in_channels: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Time (B,) in [0, 1000) to (B, D): 256 cosines and sines (cosines first), then an MLP."""

    def __init__(self, hidden_size: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = vector_mlp(frequencies, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoids(t, self.frequencies).to(self.mlp[0].weight.dtype))


def vector_mlp(inputs: int, outputs: int) -> nn.Sequential:
    """What makes a vector that blocks are modulated by: two linear maps, SiLU between them."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.SiLU(), nn.Linear(outputs, outputs))


def sinusoids(values: Tensor, channels: int) -> Tensor:
    """Values of any shape to (..., channels): cosines, then sines, of value * 10000^(-i / half).

    Float32 at least: the angles reach 1000 radians, where bf16 has no fraction left.
    """
    half = channels // 2
    dtype = torch.promote_types(values.dtype, torch.float32)
    index = torch.arange(half, dtype=dtype, device=values.device)
    angles = values.to(dtype)[..., None] * torch.exp(-math.log(10000.0) / half * index)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class LabelEmbedder(nn.Module):
    """Labels (B,) int64 in [0, num_classes] to (B, D); label `num_classes` means no class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, D) with a fused, biased query-key-value map."""

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        if qk_norm:
            self.q_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6)
            self.k_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6)

    def forward(self, x: Tensor, rope: Rope | None = None, lengths: Tensor | None = None) -> Tensor:
        """`lengths` (B,) int32: tokens at or beyond it are attended to by nobody."""
        norm = None
        if hasattr(self, "q_norm"):
            norm = QKNorm("rmsnorm", self.q_norm.weight, self.k_norm.weight)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        out = attention_packed(qkv, key_lengths=lengths, qk_norm=norm, rope=rope)
        return self.proj(out.flatten(2))


class Mlp(nn.Module):
    """Two-layer perceptron with the tanh approximation of GELU.

    Its output has as many channels as its input where `out_size` is not given.
    """

    def __init__(self, hidden_size: int, inner_size: int, out_size: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, out_size or hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class SwiGLU(nn.Module):
    """Gated MLP silu(x W_1) * (x W_2), then W_3 (Shazeer 2020); W_1 and W_2 are one map."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * inner_size)
        self.w3 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(swiglu(self.w12(x)))


def modulation(hidden_size: int, chunks: int, bottleneck: int = 1) -> nn.Sequential:
    """The adaLN map: conditioning (B, D) to (B, chunks * D), linear after SiLU.

    With a `bottleneck` above 1 there is a narrow layer before it, D / bottleneck wide.
    """
    if bottleneck == 1:
        return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, chunks * hidden_size))
    inner = hidden_size // bottleneck
    return nn.Sequential(
        nn.SiLU(),
        nn.Linear(hidden_size, inner),
        nn.SiLU(),
        nn.Linear(inner, chunks * hidden_size),
    )


class FinalLayer(nn.Module):
    """The last normalisation and the map from tokens to patches (B, N, P * P * C)."""

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, norm: str = "layernorm"
    ) -> None:
        super().__init__()
        self.norm = norm
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(self, x: Tensor, h: Tensor | None, gate: Tensor | None, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        _, y = add_and_modulate(x, h, gate, shift, scale, self.norm)
        return self.linear(y)


def add_and_modulate(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    norm: str = "layernorm",
) -> tuple[Tensor, Tensor]:
    """Add the pending branch, if any; returns the stream and its modulated normalisation."""
    if h is None or gate is None:
        return x, adaln_modulate(x, shift, scale, norm=norm)
    return gate_residual_adaln(x, h, gate, shift, scale, norm=norm)


def run_block(block: Callable, *arguments: Any, recompute: bool) -> Any:
    """`block(*arguments)`; with `recompute` it is run again in the backward pass to save memory."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False)
    return block(*arguments)


def draw_linears(model: nn.Module) -> None:
    """Xavier's uniform weights for all linear maps and that of the patches; their biases zero.

    The patches' bias stays as it is: not every publication draws it alike.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    projection = model.x_embedder.proj
    nn.init.xavier_uniform_(projection.weight.view(len(projection.weight), -1))


def draw_small(weights: Iterable[Tensor]) -> None:
    """N(0, 0.02), as embeddings start."""
    for weight in weights:
        nn.init.normal_(weight, std=0.02)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all its parameters zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def positions_2d(hidden_size: int, grid: int, coordinates: Tensor | None = None) -> Tensor:
    """Fixed sine-cosine embedding (grid * grid, D) float32 of token coordinates.

    The first half of the channels holds the column, the second the row; in each half the sines come
    first. Frequencies fall geometrically from 1 to 1/10000. `coordinates` (grid,) of the tokens of
    a row, and of a column, are 0, 1, 2, ... if not given.
    """
    quarter = hidden_size // 4
    index = torch.arange(quarter, dtype=torch.float64)
    frequency = 1.0 / 10000.0 ** (index / quarter)
    at = torch.arange(grid) if coordinates is None else coordinates
    angles = at.to(torch.float64)[:, None] * frequency
    axis = torch.cat((angles.sin(), angles.cos()), dim=1).to(torch.float32)
    column = axis[None, :, :].expand(grid, -1, -1)
    row = axis[:, None, :].expand(-1, grid, -1)
    return torch.cat((column, row), dim=2).reshape(grid * grid, hidden_size)


def rotary_2d(d: int, grid: int, coordinates: Tensor) -> Rope:
    """(cos, sin) of `kernels.rope_2d`, (grid * grid, d / 2), for tokens at other `coordinates`.

    coordinates: (grid,) of the tokens of a row, and of a column; 0, 1, 2, ... give `rope_2d`.
    """
    frequency = 10000.0 ** (-torch.arange(d // 4, dtype=torch.float64) * 4 / d)
    axis = coordinates.to(torch.float64)[:, None] * frequency
    row = axis[:, None, :].expand(-1, grid, -1)
    column = axis[None, :, :].expand(grid, -1, -1)
    angles = torch.cat((row, column), -1).flatten(0, 1)
    return angles.cos().float(), angles.sin().float()


def unpatchify(tokens: Tensor, channels: int, patch_size: int) -> Tensor:
    """Tokens (B, N, P * P * C) of a square grid to (B, C, H, W)."""
    grid = math.isqrt(tokens.shape[1])
    x = tokens.view(len(tokens), grid, grid, patch_size, patch_size, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(
        len(tokens), channels, grid * patch_size, grid * patch_size
    )
