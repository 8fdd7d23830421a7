"""CUDA twin of `statistics.py`: kernels of `csrc/cuda/statistics.cu`, registered on first use.

What it has over the Triton twin: 16-bit rows are read as they are, rows are widened and centred
once per block instead of by every product, double-precision tensor cores on every GPU from sm_80
on, and no part of the scatter matrix below the diagonal is written but the last.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends, statistics
from .cuda_calls import dtype_code, place

_TILE = 64  # rows and columns of the scatter matrix that a block makes
_DEPTH = 16  # rows that it takes at a time


@dataclass(frozen=True)
class LaunchConfig:
    """Rows that a block adds, and the tiles of the scatter matrix on or above its diagonal."""

    rows: int
    tiles: int

    @classmethod
    def for_shape(cls, N: int, D: int) -> "LaunchConfig":
        """A heuristic, not a measurement: 512 blocks, if the rows allow 1024 for each.

        It does not look at the GPU: sums are cut alike everywhere.
        """
        tiles = -(-D // _TILE)
        tiles = tiles * (tiles + 1) // 2
        runs = max(1, 512 // tiles)
        return cls(max(1024, -(-N // runs // _DEPTH) * _DEPTH), tiles)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    N, D = x.shape
    mean, scatter = statistics._made(x)
    if x.numel() == 0:
        return mean.zero_(), scatter.zero_()
    x = x if x.stride(1) == 1 else x.contiguous()
    torch.mean(x, 0, dtype=torch.float64, out=mean)
    config = LaunchConfig.for_shape(N, D)
    runs = -(-N // config.rows)
    parts = x.new_empty((runs, config.tiles, _TILE, _TILE), dtype=torch.float64)
    memory = [t.data_ptr() for t in (x, mean, parts, scatter)]
    code = dtype_code(x.dtype)
    backends.cuda().moments((N, D), memory, code, x.stride(0), config.rows, place(x))
    if backends.verifying():
        statistics.verify("CUDA moments", x, mean, scatter)
    return mean, scatter


_library = torch.library.Library("etude", "FRAGMENT")
_library.impl("cuda_moments", _moments, "CUDA")
