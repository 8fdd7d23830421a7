"""Triton twins of `resizing.py`: the same bytes on CUDA tensors, registered on first use.

Two launches, one per axis, with bytes between them as in Pillow; the second one normalises. Sums
are whole numbers, so the bytes equal the reference's exactly. A program makes ROWS rows of BLOCK
neighbouring elements; the taps of a column (along the width) or of a row (along the height) are
loaded once per tap for the whole tile, from a table with one row per tap, so that loads of
neighbouring columns are neighbours. Inputs of neighbouring outputs overlap and come from the
first-level cache. Elements are numbered in the order of the output's memory: what is written is the
larger part, up to four bytes for one read.

The tables are made on the host from the sizes, put on the device once and cached. That is why the
operator is opaque to torch.compile and not a `triton_op`: there is nothing in it to fuse with.

TRITON_INTERPRET=1 runs the kernels in Python on CPU tensors.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backends, resizing
from .compiling import Build

_MOST_PICTURES = 65535  # of a launch: programs of a grid's third dimension


@dataclass(frozen=True)
class LaunchConfig:
    """A program's tile: 16 elements per thread hide the latency of byte loads."""

    rows: int
    block: int
    warps: int = 4

    @classmethod
    def for_row(cls, length: int) -> "LaunchConfig":
        """A heuristic, not a measurement, for rows of `length` elements."""
        block = min(512, max(16, triton.next_power_of_2(length)))
        return cls(rows=4 if block >= 128 else 16, block=block)


@triton.jit
def resize_kernel(
    x_ptr, out_ptr, bounds_ptr, taps_ptr, scale_ptr, offset_ptr,
    H, W, C, outputs, ksize, x_b, x_h, x_w, x_c, out_b, out_h, out_w, out_c,
    DOWN: tl.constexpr, FLAT: tl.constexpr, PLANAR: tl.constexpr, BYTES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One axis of pictures of H x W outputs: along the height where DOWN, else along the width.

    FLAT: columns and channels are one run of W * C elements on both sides.
    """
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < H)[:, None] & (lanes < W * C)[None, :]
    if PLANAR:
        w, c = lanes % W, lanes // W
    else:
        w, c = lanes // C, lanes % C
    if FLAT:
        at_x, at_out = lanes.to(tl.int64), lanes.to(tl.int64)
    else:
        at_out = w.to(tl.int64) * out_w + c.to(tl.int64) * out_c
        at_x = c.to(tl.int64) * x_c
        if DOWN:
            at_x += w.to(tl.int64) * x_w
    x_ptr += b * x_b
    total = tl.full([ROWS, BLOCK], 1 << 21, dtype=tl.int32)
    if DOWN:
        first = tl.load(bounds_ptr + 2 * rows, mask=rows < H, other=0)
        count = tl.load(bounds_ptr + 2 * rows + 1, mask=rows < H, other=0)
        for k in range(0, ksize):
            live = k < count
            tap = tl.load(taps_ptr + k * outputs + rows, mask=live, other=0)
            at = (first + k).to(tl.int64) * x_h
            x = tl.load(x_ptr + at[:, None] + at_x[None, :], mask=mask & live[:, None], other=0)
            total += x.to(tl.int32) * tap[:, None]
    else:
        first = tl.load(bounds_ptr + 2 * w, mask=lanes < W * C, other=0)
        count = tl.load(bounds_ptr + 2 * w + 1, mask=lanes < W * C, other=0)
        at_row = rows.to(tl.int64) * x_h
        for k in range(0, ksize):
            live = k < count
            tap = tl.load(taps_ptr + k * outputs + w, mask=live, other=0)
            at = (first + k).to(tl.int64) * x_w + at_x
            x = tl.load(x_ptr + at_row[:, None] + at[None, :], mask=mask & live[None, :], other=0)
            total += x.to(tl.int32) * tap[None, :]
    value = tl.minimum(tl.maximum(total >> 22, 0), 255)
    to = out_ptr + b * out_b + (rows.to(tl.int64) * out_h)[:, None] + at_out[None, :]
    if BYTES:
        tl.store(to, value.to(tl.uint8), mask=mask)
    else:
        scale = tl.load(scale_ptr + c, mask=lanes < W * C, other=0.0)
        offset = tl.load(offset_ptr + c, mask=lanes < W * C, other=0.0)
        y = value.to(tl.float32) * scale[None, :] + offset[None, :]
        tl.store(to, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tf1_kernel(
    x_ptr, out_ptr, across_low_ptr, across_high_ptr, across_ptr,
    down_low_ptr, down_high_ptr, down_ptr, scale_ptr, offset_ptr,
    H, W, C, x_b, x_h, x_w, x_c, out_b, out_h, out_w, out_c,
    PLANAR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TensorFlow 1's rule: four bytes per output, in one launch; nothing is rounded between."""
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_rows, in_lanes = rows < H, lanes < W * C
    mask = in_rows[:, None] & in_lanes[None, :]
    if PLANAR:
        w, c = lanes % W, lanes // W
    else:
        w, c = lanes // C, lanes % C
    base = x_ptr + b * x_b + (c.to(tl.int64) * x_c)[None, :]
    left = (tl.load(across_low_ptr + w, mask=in_lanes, other=0).to(tl.int64) * x_w)[None, :]
    right = (tl.load(across_high_ptr + w, mask=in_lanes, other=0).to(tl.int64) * x_w)[None, :]
    upper = (tl.load(down_low_ptr + rows, mask=in_rows, other=0).to(tl.int64) * x_h)[:, None]
    lower = (tl.load(down_high_ptr + rows, mask=in_rows, other=0).to(tl.int64) * x_h)[:, None]
    across = tl.load(across_ptr + w, mask=in_lanes, other=0.0)[None, :]
    down = tl.load(down_ptr + rows, mask=in_rows, other=0.0)[:, None]
    one = tl.load(base + upper + left, mask=mask, other=0).to(tl.float32)
    two = tl.load(base + upper + right, mask=mask, other=0).to(tl.float32)
    top = one + (two - one) * across
    one = tl.load(base + lower + left, mask=mask, other=0).to(tl.float32)
    two = tl.load(base + lower + right, mask=mask, other=0).to(tl.float32)
    value = top + ((one + (two - one) * across) - top) * down
    scale = tl.load(scale_ptr + c, mask=in_lanes, other=0.0)
    offset = tl.load(offset_ptr + c, mask=in_lanes, other=0.0)
    y = value * scale[None, :] + offset[None, :]
    at = w.to(tl.int64) * out_w + c.to(tl.int64) * out_c
    to = out_ptr + b * out_b + (rows.to(tl.int64) * out_h)[:, None] + at[None, :]
    tl.store(to, y.to(out_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=256)
def _tables(device: torch.device, *axis: object) -> tuple[Tensor, Tensor, int]:
    """(bounds, taps with one row per tap, number of taps) of one axis on a device."""
    bounds, taps = resizing.weights(*axis)
    ksize = int(bounds[:, 1].max())
    by_tap = torch.tensor(taps[:, :ksize].T.copy(), device=device)
    return torch.tensor(bounds, device=device), by_tap, ksize


@lru_cache(maxsize=256)
def _lerps(device: torch.device, inputs: int, outputs: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(t, device=device) for t in resizing.lerps(inputs, outputs))


@lru_cache(maxsize=64)
def _affine(
    device: torch.device, mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(t, device=device) for t in resizing.affine(mean, std, channels))


def _one_pass(
    x: Tensor, out: Tensor, axis: tuple, down: bool, planar: bool, affine: tuple[Tensor, Tensor]
) -> None:
    """One launch of `resize_kernel` from x to out, both (B, H, W, C) by strides."""
    B, H, W, C = out.shape
    bounds, taps, ksize = _tables(x.device, *axis)
    dense = x.stride(3) == 1 and x.stride(2) == C and out.stride(3) == 1 and out.stride(2) == C
    config = LaunchConfig.for_row(W * C)
    grid = (triton.cdiv(W * C, config.block), triton.cdiv(H, config.rows), B)
    resize_kernel[grid](
        x, out, bounds, taps, *affine, H, W, C, taps.shape[1], ksize, *x.stride(), *out.stride(),
        DOWN=down, FLAT=down and dense, PLANAR=planar, BYTES=out.dtype == torch.uint8,
        ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip


@backends.on_its_device
def _resize(
    images: Tensor,
    size: list[int],
    filter: str,
    box: list[float],
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    planar: bool,
) -> Tensor:
    B, C = images.shape[0], images.shape[3]
    out = resizing._made(images, B, size, dtype, planar)
    if out.numel() == 0:
        return out
    affine = _affine(images.device, tuple(mean), tuple(std), C)
    for part, to in zip(images.split(_MOST_PICTURES), out.split(_MOST_PICTURES), strict=True):
        _launch(part, to, filter, box, affine, planar)
    if backends.verifying():
        pictures = images.unbind(0)
        resizing._verify("triton resize", pictures, size, filter, box, mean, std, dtype, out)
    return out


def _launch(
    images: Tensor,
    out: Tensor,
    filter: str,
    box: list[float],
    affine: tuple[Tensor, Tensor],
    planar: bool,
) -> None:
    """The one or two launches for up to `_MOST_PICTURES` pictures."""
    B, height, width, C = images.shape
    size = out.shape[1:3]
    if filter == "tf1":
        config = LaunchConfig.for_row(size[1] * C)
        grid = (triton.cdiv(size[1] * C, config.block), triton.cdiv(size[0], config.rows), B)
        tf1_kernel[grid](
            images, out, *_lerps(images.device, width, size[1]),
            *_lerps(images.device, height, size[0]), *affine,
            *size, C, *images.stride(), *out.stride(),
            PLANAR=planar, ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    else:
        across, down = resizing._axes(filter, height, width, tuple(box) or None, tuple(size))
        if resizing.columns_first(height, width, size):
            middle = images.new_empty((B, size[0], width, C))
            _one_pass(images, middle, down, True, False, affine)
            _one_pass(middle, out, across, False, planar, affine)
        else:
            middle = images.new_empty((B, height, size[1], C))
            _one_pass(images, middle, across, False, False, affine)
            _one_pass(middle, out, down, True, planar, affine)


_library = torch.library.Library("etude", "FRAGMENT")
_library.impl("triton_resize", _resize, "CUDA")
if backends.interpreting():
    _library.impl("triton_resize", _resize, "CPU")


def builds() -> list[Build]:
    """256 x 256 pictures to Inception's 299 x 299 in channels-last bfloat16, for `compiling`."""
    config = LaunchConfig.for_row(299 * 3)
    pointers = {
        "x_ptr": "*u8", "out_ptr": "*bf16", "bounds_ptr": "*i32", "taps_ptr": "*i32",
        "scale_ptr": "*fp32", "offset_ptr": "*fp32",
    }  # fmt: skip
    tile = {"PLANAR": False, "ROWS": config.rows, "BLOCK": config.block}
    made = []
    for name, down in (("across", False), ("down", True)):
        constants = tile | {"DOWN": down, "FLAT": down, "BYTES": not down, "x_c": 1, "out_c": 1}
        free = [n for n in resize_kernel.arg_names if n not in constants]
        types = {n: "i32" for n in free} | pointers
        if not down:
            types["out_ptr"] = "*u8"
        made.append(Build(f"{name} 256 to 299", resize_kernel, types, constants, (), config.warps))
    constants = tile | {"x_c": 1, "out_c": 1}
    types = {n: "i32" for n in tf1_kernel.arg_names if n not in constants}
    types |= {n: "*i32" for n in types if n.endswith(("low_ptr", "high_ptr"))}
    types |= {"across_ptr": "*fp32", "down_ptr": "*fp32"}
    types |= {n: kind for n, kind in pointers.items() if n in types}
    made.append(Build("tf1 256 to 299", tf1_kernel, types, constants, (), config.warps))
    return made
