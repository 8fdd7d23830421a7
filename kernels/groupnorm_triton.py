"""Triton twins of `groupnorm.py` for channels-last tensors (B, S, C), registered on first use.

GroupNorm is bound by memory: 4 bytes per bfloat16 element forward and 6 backward if a group is read
once, 6 and 10 if it must be read again for the second pass. Which one depends on the group's size:

    whole   a program keeps all S positions of one group in registers and does everything: for the
            small pictures of a U-Net's lower levels (8x8 to 32x32)
    split   programs take tiles of positions and leave partial sums per channel, a small kernel
            merges them per group, a third normalises: for large pictures, where a group would not
            fit and 32 programs per picture would leave most of the GPU idle

Partial sums are kept per channel, not per group, because the C / 32 channels of a group (4, 10, 20,
40, ...) are no power of two and often less than a 16-byte load; they are 1/64 of the tensor. The
order of every sum depends on the shape alone: no atomics, the same bits in every run.

TRITON_INTERPRET=1 runs the kernels in Python on CPU tensors (tests; float32 and float16 only: the
interpreter truncates where bfloat16 should round).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import backends
from .activation_triton import column_sum_kernel
from .compiling import Build
from .groupnorm import (
    group_values,
    groupnorm_silu_reference,
    register_gradients,
    verify_backward,
)
from .tensors import dense, new_like


@dataclass(frozen=True)
class LaunchConfig:
    """How one call is launched for S positions and C channels in groups of `width`."""

    whole: bool
    positions: int  # whole: S as a power of two; split: positions of a tile
    channels: int  # whole: `width` as a power of two; split: channels of a tile
    warps: int
    tiles: int = 1  # split: tiles of a chunk, which leaves one partial sum

    @classmethod
    def for_shape(cls, S: int, C: int, width: int, backward: bool) -> "LaunchConfig":
        """A heuristic, not a measurement.

        whole: 32 elements per thread and tensor in registers at most, of one tensor forward and two
        backward, in at most 16 warps. split: tiles of 64 x 64, that is 128-byte rows of bfloat16
        and 32 elements per thread; a chunk of 4 tiles makes the partial sums 1/64 of the tensor.
        """
        positions = triton.next_power_of_2(max(1, S))
        channels = triton.next_power_of_2(width)
        size = positions * channels
        if size <= (8192 if backward else 16384):
            return cls(True, positions, channels, min(16, max(1, size // 1024)))
        channels = min(64, max(16, triton.next_power_of_2(C)))
        return cls(False, 4096 // channels, channels, 4, tiles=4)

    @property
    def chunk(self) -> int:
        """Positions behind one partial sum."""
        return self.positions * self.tiles


@triton.jit
def _sigmoid(v):
    """exp2 of a large positive argument is infinite, and 1 / inf is the right 0."""
    return 1.0 / (1.0 + tl.exp2(v * -1.4426950408889634))


@triton.jit
def _before_silu(dy, v, SILU: tl.constexpr):
    """The gradient of v, from that of silu(v)."""
    if SILU:
        s = _sigmoid(v)
        dy = dy * s * (1.0 + v * (1.0 - s))
    return dy


@triton.jit
def whole_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, S, C, G, width, x_b, x_s, eps,
    SILU: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One group of one picture, read once: the variance is taken around the mean itself."""
    program = tl.program_id(0).to(tl.int64)
    b = program // G
    first = (program % G) * width
    rows = tl.arange(0, POSITIONS).to(tl.int64)
    cols = tl.arange(0, CHANNELS)
    inside = cols < width
    mask = (rows[:, None] < S) & inside[None, :]
    at = x_ptr + b * x_b + rows[:, None] * x_s + first + cols[None, :]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    count = 1.0 * S * width
    mean = tl.sum(tl.sum(x, axis=0), axis=0) / count
    centred = tl.where(mask, x - mean, 0.0)
    var = tl.sum(tl.sum(centred * centred, axis=0), axis=0) / count
    rstd = 1.0 / tl.sqrt(var + eps)
    w = tl.load(w_ptr + first + cols, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(b_ptr + first + cols, mask=inside, other=0.0).to(tl.float32)
    v = centred * rstd * w[None, :] + shift[None, :]
    if SILU:
        v = v * _sigmoid(v)
    to = y_ptr + (b * S + rows[:, None]) * C + first + cols[None, :]
    tl.store(to, v.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + program, mean)
    tl.store(rstd_ptr + program, rstd)


@triton.jit
def whole_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, dx_ptr, sums_ptr,
    S, C, G, width, dy_b, dy_s, x_b, x_s,
    SILU: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One group of one picture: dx, and its share of dweight and dbias, sums (B, 2, C)."""
    program = tl.program_id(0).to(tl.int64)
    b = program // G
    first = (program % G) * width
    rows = tl.arange(0, POSITIONS).to(tl.int64)
    cols = tl.arange(0, CHANNELS)
    inside = cols < width
    mask = (rows[:, None] < S) & inside[None, :]
    x_at = x_ptr + b * x_b + rows[:, None] * x_s + first + cols[None, :]
    dy_at = dy_ptr + b * dy_b + rows[:, None] * dy_s + first + cols[None, :]
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + first + cols, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(b_ptr + first + cols, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + program)
    rstd = tl.load(rstd_ptr + program)
    normed = (x - mean) * rstd
    d = _before_silu(d, normed * w[None, :] + shift[None, :], SILU)  # 0 where dy was masked
    plain = tl.sum(d, axis=0)
    dot = tl.sum(d * normed, axis=0)
    sums = sums_ptr + b * 2 * C + first + cols
    tl.store(sums, dot, mask=inside)
    tl.store(sums + C, plain, mask=inside)
    count = 1.0 * S * width
    average = tl.sum(plain * w, axis=0) / count
    slope = tl.sum(dot * w, axis=0) / count
    dx = rstd * (d * w[None, :] - average - normed * slope)
    to = dx_ptr + (b * S + rows[:, None]) * C + first + cols[None, :]
    tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def moments_kernel(
    x_ptr, partial_ptr, S, C, chunks, x_b, x_s,
    TILES: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Per channel, mean and squared deviations of one chunk, to partial (B, chunks, 2, C).

    Inside a tile around the tile's own mean, between tiles by Chan's formula.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    start = (program % chunks) * POSITIONS * TILES
    cols = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = cols < C
    mean = tl.zeros([CHANNELS], dtype=tl.float32)
    squares = tl.zeros([CHANNELS], dtype=tl.float32)
    seen = 0.0
    for tile in range(0, TILES):
        rows = start + tile * POSITIONS + tl.arange(0, POSITIONS)
        mask = (rows[:, None] < S) & inside[None, :]
        at = x_ptr + b * x_b + rows[:, None] * x_s + cols[None, :]
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        count = tl.minimum(tl.maximum(S - start - tile * POSITIONS, 0), POSITIONS).to(tl.float32)
        centre = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
        centred = tl.where(mask, x - centre[None, :], 0.0)
        both = tl.maximum(seen + count, 1.0)
        delta = centre - mean
        squares += tl.sum(centred * centred, axis=0) + delta * delta * (seen * count / both)
        mean += delta * (count / both)
        seen += count
    to = partial_ptr + program * 2 * C + cols
    tl.store(to, mean, mask=inside)
    tl.store(to + C, squares, mask=inside)


@triton.jit
def merge_kernel(
    partial_ptr, mean_ptr, rstd_ptr, S, C, G, width, chunks, chunk, eps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One group of one picture: its mean, then the deviations of chunks and channels from it."""
    program = tl.program_id(0).to(tl.int64)
    b = program // G
    cols = tl.arange(0, CHANNELS)
    inside = cols < width
    base = partial_ptr + b * chunks * 2 * C + (program % G) * width + cols[None, :]
    total = 1.0 * S * width
    sums = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    for start in range(0, chunks, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows[:, None] < chunks) & inside[None, :]
        count = tl.minimum(S - rows * chunk, chunk).to(tl.float32)
        part = tl.load(base + rows[:, None] * 2 * C, mask=mask, other=0.0)
        sums += part * (count / total)[:, None]
    mean = tl.sum(tl.sum(sums, axis=0), axis=0)
    sums = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    for start in range(0, chunks, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows[:, None] < chunks) & inside[None, :]
        count = tl.minimum(S - rows * chunk, chunk).to(tl.float32)
        part = tl.load(base + rows[:, None] * 2 * C, mask=mask, other=0.0)
        squares = tl.load(base + rows[:, None] * 2 * C + C, mask=mask, other=0.0)
        delta = tl.where(mask, part - mean, 0.0)
        sums += squares + delta * delta * count[:, None]
    var = tl.sum(tl.sum(sums, axis=0), axis=0) / total
    tl.store(mean_ptr + program, mean)
    tl.store(rstd_ptr + program, 1.0 / tl.sqrt(var + eps))


@triton.jit
def apply_kernel(
    x_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, y_ptr, S, C, G, width, blocks, x_b, x_s,
    SILU: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of y; each channel looks its group's mean and deviation up."""
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    rows = (program % blocks) * POSITIONS + tl.arange(0, POSITIONS)
    cols = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = cols < C
    mask = (rows[:, None] < S) & inside[None, :]
    x = tl.load(x_ptr + b * x_b + rows[:, None] * x_s + cols[None, :], mask=mask, other=0.0)
    mean = tl.load(mean_ptr + b * G + cols // width, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + b * G + cols // width, mask=inside, other=0.0)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    v = (x.to(tl.float32) - mean[None, :]) * (rstd * w)[None, :] + shift[None, :]
    if SILU:
        v = v * _sigmoid(v)
    to = y_ptr + (b * S + rows[:, None]) * C + cols[None, :]
    tl.store(to, v.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sums_kernel(
    dy_ptr, x_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, partial_ptr,
    S, C, G, width, chunks, dy_b, dy_s, x_b, x_s,
    SILU: tl.constexpr, TILES: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Per channel, sums of d * normed and of d over one chunk, to partial (B, chunks, 2, C)."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    start = (program % chunks) * POSITIONS * TILES
    cols = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = cols < C
    mean = tl.load(mean_ptr + b * G + cols // width, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + b * G + cols // width, mask=inside, other=0.0)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    plain = tl.zeros([CHANNELS], dtype=tl.float32)
    dot = tl.zeros([CHANNELS], dtype=tl.float32)
    for tile in range(0, TILES):
        rows = start + tile * POSITIONS + tl.arange(0, POSITIONS)
        mask = (rows[:, None] < S) & inside[None, :]
        x = tl.load(x_ptr + b * x_b + rows[:, None] * x_s + cols[None, :], mask=mask, other=0.0)
        d = tl.load(dy_ptr + b * dy_b + rows[:, None] * dy_s + cols[None, :], mask=mask, other=0.0)
        normed = (x.to(tl.float32) - mean[None, :]) * rstd[None, :]
        d = _before_silu(d.to(tl.float32), normed * w[None, :] + shift[None, :], SILU)
        plain += tl.sum(d, axis=0)
        dot += tl.sum(d * normed, axis=0)
    to = partial_ptr + program * 2 * C + cols
    tl.store(to, dot, mask=inside)
    tl.store(to + C, plain, mask=inside)


@triton.jit
def merge_sums_kernel(
    partial_ptr, w_ptr, sums_ptr, means_ptr, S, C, G, width, chunks,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One group of one picture: its channels' sums (B, 2, C), and the two means (B, 2, G) of dx."""
    program = tl.program_id(0).to(tl.int64)
    b = program // G
    g = program % G
    cols = tl.arange(0, CHANNELS)
    inside = cols < width
    base = partial_ptr + b * chunks * 2 * C + g * width + cols[None, :]
    dots = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    plains = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    for start in range(0, chunks, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows[:, None] < chunks) & inside[None, :]
        dots += tl.load(base + rows[:, None] * 2 * C, mask=mask, other=0.0)
        plains += tl.load(base + rows[:, None] * 2 * C + C, mask=mask, other=0.0)
    dot = tl.sum(dots, axis=0)
    plain = tl.sum(plains, axis=0)
    to = sums_ptr + b * 2 * C + g * width + cols
    tl.store(to, dot, mask=inside)
    tl.store(to + C, plain, mask=inside)
    w = tl.load(w_ptr + g * width + cols, mask=inside, other=0.0).to(tl.float32)
    total = 1.0 * S * width
    tl.store(means_ptr + b * 2 * G + g, tl.sum(dot * w, axis=0) / total)
    tl.store(means_ptr + b * 2 * G + G + g, tl.sum(plain * w, axis=0) / total)


@triton.jit
def gradient_kernel(
    dy_ptr, x_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, means_ptr, dx_ptr,
    S, C, G, width, blocks, dy_b, dy_s, x_b, x_s,
    SILU: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of dx; d is computed again, which costs less than writing and reading it."""
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    rows = (program % blocks) * POSITIONS + tl.arange(0, POSITIONS)
    cols = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = cols < C
    mask = (rows[:, None] < S) & inside[None, :]
    group = cols // width
    x = tl.load(x_ptr + b * x_b + rows[:, None] * x_s + cols[None, :], mask=mask, other=0.0)
    d = tl.load(dy_ptr + b * dy_b + rows[:, None] * dy_s + cols[None, :], mask=mask, other=0.0)
    mean = tl.load(mean_ptr + b * G + group, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + b * G + group, mask=inside, other=0.0)
    slope = tl.load(means_ptr + b * 2 * G + group, mask=inside, other=0.0)
    average = tl.load(means_ptr + b * 2 * G + G + group, mask=inside, other=0.0)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    normed = (x.to(tl.float32) - mean[None, :]) * rstd[None, :]
    d = _before_silu(d.to(tl.float32), normed * w[None, :] + shift[None, :], SILU)
    dx = rstd[None, :] * (d * w[None, :] - average[None, :] - normed * slope[None, :])
    to = dx_ptr + (b * S + rows[:, None]) * C + cols[None, :]
    tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton_op("etude::triton_groupnorm_silu", mutates_args={})
@backends.on_its_device
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    channels_last: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = new_like(x, out_dtype), group_values(x, groups), group_values(x, groups)
    if x.numel() == 0:
        return y, torch.zeros_like(mean), torch.zeros_like(rstd)
    B, S, C = x.shape
    width = C // groups
    x, weight, bias = dense(x), weight.contiguous(), bias.contiguous()
    config = LaunchConfig.for_shape(S, C, width, backward=False)
    shape = {"POSITIONS": config.positions, "CHANNELS": config.channels}
    if config.whole:
        wrap_triton(whole_fwd_kernel)[(B * groups,)](
            x, weight, bias, y, mean, rstd, S, C, groups, width, x.stride(0), x.stride(1), eps,
            SILU=silu, **shape, num_warps=config.warps,
        )  # fmt: skip
    else:
        chunks, blocks = triton.cdiv(S, config.chunk), triton.cdiv(S, config.positions)
        columns = triton.cdiv(C, config.channels)
        partial = x.new_empty((B, chunks, 2, C), dtype=torch.float32)
        wrap_triton(moments_kernel)[(B * chunks, columns)](
            x, partial, S, C, chunks, x.stride(0), x.stride(1),
            TILES=config.tiles, **shape, num_warps=config.warps,
        )  # fmt: skip
        wrap_triton(merge_kernel)[(B * groups,)](
            partial, mean, rstd, S, C, groups, width, chunks, config.chunk, eps,
            ROWS=16, CHANNELS=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
        wrap_triton(apply_kernel)[(B * blocks, columns)](
            x, weight, bias, mean, rstd, y, S, C, groups, width, blocks, x.stride(0), x.stride(1),
            SILU=silu, **shape, num_warps=config.warps,
        )  # fmt: skip
    if backends.verifying():
        want = groupnorm_silu_reference(
            x.transpose(1, 2), groups, weight, bias, eps, silu, out_dtype=out_dtype
        )
        backends.verify("triton groupnorm_silu", ("y",), (y,), (want.transpose(1, 2),))
    return y, mean, rstd


@triton_op("etude::triton_groupnorm_silu_backward", mutates_args={})
@backends.on_its_device
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = new_like(x), new_like(weight), new_like(bias)
    if x.numel() == 0:
        return dx, torch.zeros_like(dweight), torch.zeros_like(dbias)
    (B, S, C), groups = x.shape, mean.shape[1]
    width = C // groups
    dy, x, weight, bias = dense(dy), dense(x), weight.contiguous(), bias.contiguous()
    given = (dy, x, weight, bias, mean, rstd)
    strides = (dy.stride(0), dy.stride(1), x.stride(0), x.stride(1))
    config = LaunchConfig.for_shape(S, C, width, backward=True)
    shape = {"POSITIONS": config.positions, "CHANNELS": config.channels}
    sums = x.new_empty((B, 2, C), dtype=torch.float32)
    if config.whole:
        wrap_triton(whole_bwd_kernel)[(B * groups,)](
            *given, dx, sums, S, C, groups, width, *strides,
            SILU=silu, **shape, num_warps=config.warps,
        )  # fmt: skip
    else:
        chunks, blocks = triton.cdiv(S, config.chunk), triton.cdiv(S, config.positions)
        columns = triton.cdiv(C, config.channels)
        partial = x.new_empty((B, chunks, 2, C), dtype=torch.float32)
        means = x.new_empty((B, 2, groups), dtype=torch.float32)
        wrap_triton(sums_kernel)[(B * chunks, columns)](
            *given, partial, S, C, groups, width, chunks, *strides,
            SILU=silu, TILES=config.tiles, **shape, num_warps=config.warps,
        )  # fmt: skip
        wrap_triton(merge_sums_kernel)[(B * groups,)](
            partial, weight, sums, means, S, C, groups, width, chunks,
            ROWS=16, CHANNELS=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
        wrap_triton(gradient_kernel)[(B * blocks, columns)](
            *given, means, dx, S, C, groups, width, blocks, *strides,
            SILU=silu, **shape, num_warps=config.warps,
        )  # fmt: skip
    # Over the pictures, in order: columns of (B, 2 C), with weight and bias side by side.
    both = x.new_empty(2 * C, dtype=torch.float32)
    wrap_triton(column_sum_kernel)[(triton.cdiv(2 * C, 64),)](
        sums, both, B, 2 * C, ROWS=16, BLOCK=64, num_warps=4
    )
    made = dx, both[:C].to(weight.dtype, copy=True), both[C:].to(bias.dtype, copy=True)
    if backends.verifying():
        verify_backward("triton groupnorm_silu_backward", made, given[:4], mean, rstd, silu, True)
    return made


register_gradients("triton_")


def builds() -> list[Build]:
    """Launches of a U-Net (1280 channels at 8x8, 640 at 32x32, 320 at 64x64) and of a VAE (128
    channels at 256x256) in bfloat16, for `compiling`."""
    made = []
    for C, side in ((1280, 8), (640, 32), (320, 64), (128, 256)):
        S, width = side * side, C // 32
        for backward in (False, True):
            config = LaunchConfig.for_shape(S, C, width, backward)
            shape = {"POSITIONS": config.positions, "CHANNELS": config.channels}
            merged = {"ROWS": 16, "CHANNELS": triton.next_power_of_2(width)}
            silu, tiles = {"SILU": True}, {"TILES": config.tiles}
            if config.whole:
                listed = [
                    (whole_bwd_kernel if backward else whole_fwd_kernel, silu | shape, config.warps)
                ]
            elif backward:
                listed = [
                    (sums_kernel, silu | tiles | shape, config.warps),
                    (merge_sums_kernel, merged, 4),
                    (gradient_kernel, silu | shape, config.warps),
                ]
            else:
                listed = [
                    (moments_kernel, tiles | shape, config.warps),
                    (merge_kernel, merged, 4),
                    (apply_kernel, silu | shape, config.warps),
                ]
            for kernel, constants, warps in listed:
                made.append(
                    _build(f"{kernel.__name__} C={C} {side}x{side}", kernel, constants, warps)
                )
    return made


def _build(name: str, kernel: triton.JITFunction, constants: dict, warps: int) -> Build:
    wide = ("mean_ptr", "rstd_ptr", "partial_ptr", "sums_ptr", "means_ptr")
    unaligned = ("width", "chunks", "blocks", "eps")
    free = [n for n in kernel.arg_names if n not in constants]
    types = {n: "fp32" if n == "eps" else "i32" for n in free}
    types |= {n: "*fp32" if n in wide else "*bf16" for n in free if n.endswith("_ptr")}
    aligned = tuple(n for n in free if not n.endswith("_ptr") and n not in unaligned)
    return Build(name, kernel, types, constants, aligned, warps)
