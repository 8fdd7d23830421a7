"""Parts of MDTv2: attention with a bias by relative position, its block, and a choice of tokens.

Called by `mdt.py` alone. A masked pass works on K of a picture's N tokens, others for every row of
the batch; `Kept` moves tokens and biases between the two. No token is chosen twice, so the gradient
of a choice is a choice as well, by the inverse places: nothing is scattered, and a run repeated has
the same bits. Shapes: B batch, N tokens, K kept tokens, D hidden size, H heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from etude.kernels import (
    attention_packed,
    gate_residual,
    gate_residual_adaln,
    relative_position_bias,
)

from .blocks import Attention, Mlp, add_and_modulate, modulation


class Kept(NamedTuple):
    """Which tokens of each picture are kept, and where each of them stands among those.

    keep: (B, K) int64 in [0, N), distinct in a row; place: (B, N) int64, K for a token not kept;
    pairs: (B, K * K), and pair_places: (B, N * N), the same for pairs of tokens, row by row.
    """

    keep: Tensor
    place: Tensor
    pairs: Tensor
    pair_places: Tensor

    @classmethod
    def of(cls, keep: Tensor, batch: int, tokens: int) -> "Kept":
        """For keep (B, K) of `tokens` tokens; ValueError for another shape or dtype."""
        fits = keep.dim() == 2 and keep.shape[0] == batch and 0 < keep.shape[1] <= tokens
        if not fits or keep.dtype != torch.int64:
            raise ValueError(
                f"keep must be ({batch}, 1 to {tokens}) of int64, got {tuple(keep.shape)} of"
                f" {keep.dtype}"
            )
        B, K = keep.shape
        order = torch.arange(K, device=keep.device).expand(B, K)
        place = keep.new_full((B, tokens), K).scatter(1, keep, order)
        pairs = keep[:, :, None] * tokens + keep[:, None, :]
        first, second = place[:, :, None], place[:, None, :]
        missing = (first == K) | (second == K)
        both = (first * K + second).masked_fill(missing, K * K)
        return cls(keep, place, pairs.flatten(1), both.flatten(1))

    @property
    def absent(self) -> Tensor:
        """(B, N, 1) bool: tokens not kept."""
        return (self.place == self.keep.shape[1])[:, :, None]

    def take(self, x: Tensor) -> Tensor:
        """The kept of all tokens: (B, N, D) to (B, K, D)."""
        return _Take.apply(x, self.keep, self.place, 1)

    def spread(self, x: Tensor) -> Tensor:
        """Kept tokens back in their places, zeros between: (B, K, D) to (B, N, D)."""
        return _Spread.apply(x, self.keep, self.place, 1)

    def bias(self, bias: Tensor) -> Tensor:
        """The bias between kept tokens: (1, H, N, N) to (B, H, K, K)."""
        B, K = self.keep.shape
        pairs = bias.flatten(2).expand(B, -1, -1)
        return _Take.apply(pairs, self.pairs, self.pair_places, 2).unflatten(2, (K, K))


class _Take(torch.autograd.Function):
    """x[b, index[b]] along dimension `dim`, 1 or 2 of 3."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, place: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index, place)
        ctx.dim = dim
        return _pick(x, index, dim)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Spread.apply(grad, *ctx.saved_tensors, ctx.dim), None, None, None


class _Spread(torch.autograd.Function):
    """The inverse of `_Take`, with zeros where nothing was taken."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, place: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index, place)
        ctx.dim = dim
        count = x.shape[dim]
        rows = _pick(x, place.clamp(max=count - 1), dim)
        return rows.masked_fill((place == count).unsqueeze(3 - dim), 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Take.apply(grad, *ctx.saved_tensors, ctx.dim), None, None, None


def _pick(x: Tensor, index: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = index.shape[1]
    return x.gather(dim, index.unsqueeze(3 - dim).expand(shape))


class RelativePositionBias(nn.Module):
    """A learned score (H) for each relative position of two tokens on a square grid.

    The table has three more rows, those of BEiT's class token, which MDTv2 keeps but does not use.
    """

    def __init__(self, grid: int, num_heads: int) -> None:
        super().__init__()
        self.grid = grid
        rows = (2 * grid - 1) ** 2 + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))

    def forward(self, dtype: torch.dtype) -> Tensor:
        """(1, H, N, N), summed up in float32 at least when differentiated."""
        table = self.relative_position_bias_table
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        return relative_position_bias(table, self.grid, self.grid).to(dtype)


class BiasedAttention(Attention):
    """Self-attention of tokens (B, N, D) on a grid, or of those K of them that are kept."""

    def __init__(self, hidden_size: int, num_heads: int, grid: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.rel_pos_bias = RelativePositionBias(grid, num_heads)

    def forward(self, x: Tensor, kept: Kept | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        bias = self.rel_pos_bias(qkv.dtype)
        bias = bias if kept is None else kept.bias(bias)
        return self.proj(attention_packed(qkv, bias=bias).flatten(2))


class MDTBlock(nn.Module):
    """One transformer block on a stream whose last branch is still to be added."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, grid: int, *, skip: bool = False
    ) -> None:
        super().__init__()
        D = hidden_size
        self.attn = BiasedAttention(D, num_heads, grid)
        self.mlp = Mlp(D, int(D * mlp_ratio))
        self.adaLN_modulation = modulation(D, 6)
        self.skip_linear = nn.Linear(2 * D, D) if skip else None

    def forward(
        self,
        x: Tensor,
        h: Tensor | None,
        gate: Tensor | None,
        c: Tensor,
        skip: Tensor | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The stream as it came in, complete, then the stream (x, h, gate) as it goes on.

        skip: of x's shape, for a block that has a skip connection; kept: in a masked pass, which
        tokens x holds.
        """
        D = x.shape[-1]
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat((complete(x, h, gate), skip), dim=-1))
            h = gate = None
        # Six vectors: shift_1, scale_1, the neighbours gate_1, shift_2, scale_2, and gate_2.
        vectors = self.adaLN_modulation(c).split((D, D, 3 * D, D), 1)
        before, y = add_and_modulate(x, h, gate, vectors[0], vectors[1])
        x, y = gate_residual_adaln(before, self.attn(y, kept), modulation=vectors[2])
        return before, x, self.mlp(y), vectors[3]


def complete(x: Tensor, h: Tensor | None, gate: Tensor | None) -> Tensor:
    """A stream (B, N, D) with its last branch added."""
    return x if h is None or gate is None else gate_residual(x, h, gate)
