"""The vision transformer of CLIP and DINOv2, one tower for both; called by their backbones.

A class token (and registers) stand with the patches' tokens, learned positions are added, and a
block is

    x <- x + a * Attention(LN(x));  x <- x + b * MLP(LN(x))

with a and b per channel in DINOv2 and 1 in CLIP. Parameter names are those of DINOv2's publication,
to which each backbone brings the layouts that it reads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.kernels import linear_gelu
from etude.models.blocks import Attention, PatchEmbed, SwiGLU


class _Mlp(nn.Module):
    """Two linear maps with GELU between them: "gelu" exact, "quick_gelu" as x sigmoid(1.702 x)."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "gelu":
            return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias, approximate="none"))
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class _Scale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    """Attention and MLP, each normalised before and added to the stream (B, N, D)."""

    def __init__(
        self, width: int, heads: int, inner: int, activation: str, eps: float, scaled: bool
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        swiglu = activation == "swiglu"
        self.mlp = SwiGLU(width, inner) if swiglu else _Mlp(width, inner, activation)
        self.ls1, self.ls2 = (_Scale(width) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Pictures (B, 3, S, S) to the class token and the patches' tokens after the last block.

    Args:
        width, depth, heads: of the stream.
        inner: width inside an MLP.
        patch: side of a patch, pixels.
        places: positions, the class token's with them.
        activation: "gelu", "quick_gelu" or "swiglu".
        eps: of every normalisation.
        scaled: whether a block has factors per channel.
        normed_before: whether there is a normalisation before the first block.
        registers: further tokens without a position, after the class token.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        inner: int,
        patch: int,
        places: int,
        *,
        activation: str,
        eps: float,
        scaled: bool = False,
        normed_before: bool = False,
        registers: int = 0,
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, places, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.registers = registers
        self.patch_embed = PatchEmbed(3, patch, width)
        self.norm_before = nn.LayerNorm(width, eps=eps) if normed_before else nn.Identity()
        self.blocks = nn.ModuleList(
            _Block(width, heads, inner, activation, eps, scaled) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The class token (B, D) and the patches' tokens (B, N, D), not normalised."""
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        if self.registers:
            more = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat((x[:, :1], more, x[:, 1:]), 1)
        x = self.norm_before(x)
        for block in self.blocks:
            x = block(x)
        return x[:, 0], x[:, 1 + self.registers :]


def resampled_positions(positions: Tensor, grid: int, *, antialias: bool, offset: float) -> Tensor:
    """Learned positions (1, 1 + N, D) for a square of `grid` patches, bicubic; the first stays.

    As DINOv2 was published (Oquab et al. 2023): without registers the scale is that of a grid
    larger by `offset` = 0.1, without antialiasing; with registers (Darcet et al. 2024) neither.
    """
    first, rest = positions[:, :1], positions[:, 1:]
    side = round(rest.shape[1] ** 0.5)
    if side == grid:
        return positions
    square = rest.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    how = {"scale_factor": ((grid + offset) / side,) * 2} if offset else {"size": (grid, grid)}
    square = F.interpolate(square, mode="bicubic", antialias=antialias, **how)
    return torch.cat((first, square.permute(0, 2, 3, 1).flatten(1, 2)), 1)


def join_qkv(state: dict[str, Tensor], query: str, key: str, value: str) -> None:
    """Make one map of three, in place: names that end so become `attn.qkv`.

    query, key, value: what stands between a block's name and ".weight" or ".bias".
    """
    for name in [name for name in state if f".{query}." in name]:
        names = [name.replace(f".{query}.", f".{part}.") for part in (query, key, value)]
        if all(part in state for part in names):
            whole = torch.cat([state.pop(part) for part in names])
            state[name.replace(f".{query}.", ".attn.qkv.")] = whole
