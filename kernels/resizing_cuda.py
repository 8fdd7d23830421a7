"""CUDA twin of `resizing.py`: kernels of `csrc/cuda/resizing.cu`, registered on first use.

What it has over the Triton twin: Pillow's two passes in one launch, the bytes between them in
shared memory, and outputs with the reference's bits, floats included. Filters that reach too far
for shared memory, and pictures that Pillow resamples along the height first, take two launches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import backends, resizing
from .cuda_calls import dtype_code, place

_LANES = 128  # neighbouring elements of a row that a block makes, a byte each between the passes
_SHARED = 48 * 1024  # bytes that a block may have without asking
_FULL = 44 * 1024  # with which as many blocks as registers allow, five, share a multiprocessor
_SMS = 132  # of an H100 or H200


@dataclass(frozen=True)
class LaunchConfig:
    """Rows that a block makes, and how many input rows these need at most; rows 0: two launches."""

    rows: int
    span: int

    @classmethod
    @lru_cache(maxsize=256)
    def for_shape(cls, blocks_per_row: int, *axis: object) -> "LaunchConfig":
        """A heuristic, not a measurement, from the height's `weights(*axis)`.

        The more rows, the fewer are made twice; but not so many that blocks fit a multiprocessor
        less often, or that there are fewer than eight for each.
        """
        bounds, _ = resizing.weights(*axis)
        choices = []
        for rows in (8, 16, 32, 64):
            starts = np.arange(0, len(bounds), rows)
            ends = np.maximum.reduceat(bounds.sum(1), starts)
            choices.append(cls(rows, int((ends - bounds[starts, 0]).max())))
        best = cls(0, 0)
        for one in choices:
            limit = _SHARED if one.rows == choices[0].rows else _FULL
            blocks = -(-len(bounds) // one.rows) * blocks_per_row
            if one.span * _LANES <= limit and (best.rows == 0 or blocks >= 8 * _SMS):
                best = one
        return best


@lru_cache(maxsize=256)
def _weights(device: torch.device, down: bool, *axis: object) -> tuple[Tensor, Tensor]:
    """(bounds, weights) of one axis on a device: by output along the height, else by tap."""
    bounds, taps = resizing.weights(*axis)
    taps = taps[:, : int(bounds[:, 1].max())]
    return tuple(torch.tensor(t.copy(), device=device) for t in (bounds, taps if down else taps.T))


@lru_cache(maxsize=256)
def _lerps(device: torch.device, inputs: int, outputs: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(t, device=device) for t in resizing.lerps(inputs, outputs))


@lru_cache(maxsize=64)
def _affine(
    device: torch.device, mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(t, device=device) for t in resizing.affine(mean, std, channels))


def _arguments(x: Tensor, out: Tensor, affine: tuple[Tensor, Tensor], planar: bool) -> tuple:
    """What the extension calls a Resize: x by its strides, out dense in one of two orders."""
    B, H, W, C = out.shape
    run = W if planar else W * C
    vectors = run % 4 == 0 and out.data_ptr() % (4 * out.element_size()) == 0
    code = -1 if out.dtype == torch.uint8 else dtype_code(out.dtype)
    addresses = [x.data_ptr(), out.data_ptr(), *(t.data_ptr() for t in affine)]
    return addresses, x.stride(), (B, H, W, C), code, planar, vectors


def _axis(x: Tensor, axis: tuple, down: bool) -> tuple[int, int, int]:
    bounds, taps = _weights(x.device, down, *axis)
    return bounds.data_ptr(), taps.data_ptr(), taps.shape[1 if down else 0]


def _resize(
    images: Tensor,
    size: Sequence[int],
    filter: str,
    box: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    planar: bool,
) -> Tensor:
    B, height, width, C = images.shape
    out = resizing._made(images, B, size, dtype, planar)
    if out.numel() == 0:
        return out
    library, where = backends.cuda(), place(images)
    affine = _affine(images.device, tuple(mean), tuple(std), C)
    if filter == "tf1":
        tables = [
            tuple(t.data_ptr() for t in _lerps(images.device, n, m))
            for n, m in ((width, size[1]), (height, size[0]))
        ]
        library.resize_tf1(_arguments(images, out, affine, planar), *tables, where)
    else:
        axes = resizing._axes(filter, height, width, tuple(box) or None, tuple(size))
        across, down = (_axis(images, axis, i == 1) for i, axis in enumerate(axes))
        swapped = resizing.columns_first(height, width, size)
        config = LaunchConfig.for_shape(B * -(-size[1] * C // _LANES), *axes[1])
        if config.rows and not swapped:
            given = _arguments(images, out, affine, planar)
            library.resize_both(given, across, down, config.rows, config.span, where)
        else:
            shape = (B, size[0], width, C) if swapped else (B, height, size[1], C)
            middle = images.new_empty(shape)
            one, two = (down, across) if swapped else (across, down)
            library.resize_one(_arguments(images, middle, affine, False), one, swapped, where)
            library.resize_one(_arguments(middle, out, affine, planar), two, not swapped, where)
    if backends.verifying():
        pictures = images.unbind(0)
        resizing._verify("CUDA resize", pictures, size, filter, box, mean, std, dtype, out)
    return out


_library = torch.library.Library("etude", "FRAGMENT")
_library.impl("cuda_resize", _resize, "CUDA")
