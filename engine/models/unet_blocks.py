"""Building blocks of the U-Net: residual block, transformer over positions, resampling.

Called by `unet.py`. Parameter names are those of latent-diffusion (Rombach et al. 2022), which
keep the numbers of layers that have no weights. Shapes: B batch, C channels, H and W, N = H W
positions, D = C channels of a token, M context tokens of width K.

Feature maps stay in the memory format they come in: with channels last the positions are the rows
of a (B, N, C) tensor already, and neither the transformer nor a normalisation copies anything.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from etude.kernels import (
    adaln_modulate,
    bias_gelu,
    dot_product_attention,
    gate_residual_adaln,
    groupnorm_silu,
)

from .blocks import zeroed

GROUPS = 32  # of every group normalisation


class GroupNorm(nn.GroupNorm):
    """GroupNorm of (B, C, H, W) in 32 groups, followed by SiLU where `silu`."""

    def __init__(self, channels: int, *, silu: bool = True, eps: float = 1e-5) -> None:
        super().__init__(GROUPS, channels, eps=eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return groupnorm_silu(x, GROUPS, self.weight, self.bias, self.eps, self.silu)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of tokens (B, N, D) with weight and bias, fused with the residual before it.

    The kernel is adaLN's: weight = 1 + scale and bias = shift, the same for every sample.
    """

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + h, its normalisation); h is a branch not yet added to x, None where there is none"""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        scale = (self.weight.to(wide) - 1.0).expand(len(x), -1)
        shift = self.bias.to(wide).expand(len(x), -1)
        if h is None:
            return x, adaln_modulate(x, shift, scale, eps=self.eps)
        gate = torch.ones_like(self.bias, dtype=wide).expand(len(x), -1)
        return gate_residual_adaln(x, h, gate, shift, scale, eps=self.eps)


class ResBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x))) + shift))), the shift a linear map of the time.

    The last convolution starts at zero. The linear map (`emb_layers`) is applied by the network,
    for all its blocks at once.
    """

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(inputs), nn.Identity(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs))
        self.out_layers = nn.Sequential(
            GroupNorm(outputs),
            nn.Identity(),
            nn.Identity(),
            zeroed(nn.Conv2d(outputs, outputs, 3, padding=1)),
        )
        same = inputs == outputs
        self.skip_connection = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """x: (B, inputs, H, W); shift: (B, outputs). Returns (B, outputs, H, W)."""
        h = self.in_layers(x) + shift[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Attention from tokens (B, N, D) to a context (B, M, K), or to themselves."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.heads, context_width = heads, context_width or width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(
        self, x: Tensor, context: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """lengths: (B,) int32, context tokens to attend to; None for all."""
        context = x if context is None else context
        given = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in given)
        return self.to_out(dot_product_attention(q, k, v, key_lengths=lengths).flatten(2))


class GEGLU(nn.Module):
    """value * gelu(gate), both halves of one linear map (Shazeer 2020); the erf form of GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * bias_gelu(gate, None, approximate="none")


class FeedForward(nn.Module):
    """Gated two-layer perceptron, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context where there is one, feed-forward; all pre-norm."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, heads)
        self.norm1 = LayerNorm(width)
        self.context_width = context_width
        if context_width:
            self.attn2 = CrossAttention(width, heads, context_width)
            self.norm2 = LayerNorm(width)
        self.ff = FeedForward(width)
        self.norm3 = LayerNorm(width)

    def forward(
        self, x: Tensor, h: Tensor | None, context: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The stream x (B, N, D) and its last branch h, not yet added, to the next such pair."""
        x, y = self.norm1(x, h)
        h = self.attn1(y)
        if self.context_width:
            x, y = self.norm2(x, h)
            h = self.attn2(y, context, lengths)
        x, y = self.norm3(x, h)
        return x, self.ff(y)


class SpatialTransformer(nn.Module):
    """x + proj_out(blocks(proj_in(norm(x)))), blocks over the positions; starts as the identity.

    The projections are 1 x 1 convolutions in latent-diffusion, linear maps of tokens in SDXL: the
    same arithmetic, the weights of another shape.
    """

    def __init__(
        self, channels: int, heads: int, depth: int, context_width: int, linear: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(channels, silu=False, eps=1e-6)
        projections = (
            nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
            for _ in range(2)
        )
        self.proj_in = next(projections)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_width) for _ in range(depth)
        )
        self.proj_out = zeroed(next(projections))

    def forward(self, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> Tensor:
        """x: (B, C, H, W); context: (B, M, K); lengths: (B,) int32. Returns (B, C, H, W)."""
        B, C, H, W = x.shape
        y = self.norm(x)
        if not self.linear:
            y = self.proj_in(y)
        stream: Tensor = y.permute(0, 2, 3, 1).reshape(B, H * W, C)
        if self.linear:
            stream = self.proj_in(stream)
        branch: Tensor | None = None
        for block in self.transformer_blocks:
            stream, branch = block(stream, branch, context, lengths)
        assert branch is not None
        y = stream + branch
        if self.linear:
            y = self.proj_out(y)
        y = y.view(B, H, W, C).permute(0, 3, 1, 2)
        return x + (y if self.linear else self.proj_out(y))


class Downsample(nn.Module):
    """Half the height and width, by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Twice the height and width: every position four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.ModuleList):
    """Layers one after another, each given what it takes besides the feature map."""

    def forward(
        self,
        x: Tensor,
        shifts: tuple[Tensor, ...],
        context: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor:
        """shifts: one (B, C) for each residual block, in order."""
        left = iter(shifts)
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, next(left))
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, lengths)
            else:
                x = layer(x)
        return x
