"""Triton twin of `statistics.py`: tiles of the scatter matrix on the double-precision units.

A program makes one tile on or above the diagonal from a run of rows: it loads float32 rows, widens
and centres them in registers, and multiplies in float64 (tensor cores on sm_80 and sm_90). Next to
a library's product of a centred float64 copy this halves the multiplications and never writes or
reads that copy, 8 bytes per element against 4. (16-bit rows are widened to float32 before: Triton
3.7 fails on a 16-bit operand of a float64 product.) Where the tiles alone do not fill the GPU the
rows are split into runs, whose sums are added in order afterwards: no atomics, the same bits in
every run.

TRITON_INTERPRET=1 runs the kernel in Python on CPU tensors.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backends, statistics
from .compiling import Build


@dataclass(frozen=True)
class LaunchConfig:
    """A program's tile (block x block) and step along the rows."""

    block: int
    depth: int
    warps: int
    run: int  # rows per program

    @classmethod
    def for_shape(cls, N: int, D: int, capability: int) -> "LaunchConfig":
        """A heuristic, not a measurement.

        64 x 64 float64 sums over 8 warps are 32 registers a thread. From sm_100 on Triton has no
        double-precision tensor-core product and fails on such tiles; 32 x 32 ones take the plain
        units. At least 512 programs if the rows allow 1024 for each.
        """
        block, depth, warps = (64, 16, 8) if capability < 100 else (32, 32, 4)
        if D <= 32:
            block, depth, warps = 32, 32, 4
        tiles = triton.cdiv(D, block)
        wanted = max(1, 512 // (tiles * (tiles + 1) // 2))
        run = max(1024, triton.cdiv(triton.cdiv(N, wanted), depth) * depth)
        return cls(block, depth, warps, run)


@triton.jit
def scatter_kernel(
    x_ptr, mean_ptr, out_ptr, N, D, x_n, run,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[z] (D, D), tile (i, j) with i <= j: sum over run z of centred rows' products."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    if i <= j:
        z = tl.program_id(2)
        one = i * BLOCK + tl.arange(0, BLOCK)
        two = j * BLOCK + tl.arange(0, BLOCK)
        mean_one = tl.load(mean_ptr + one, mask=one < D, other=0.0)
        mean_two = tl.load(mean_ptr + two, mask=two < D, other=0.0)
        total = tl.zeros([BLOCK, BLOCK], dtype=tl.float64)
        for start in range(0, run, DEPTH):
            n = z * run + start + tl.arange(0, DEPTH)
            live = ((n < N) & (start + tl.arange(0, DEPTH) < run))[:, None]
            at = x_ptr + (n.to(tl.int64) * x_n)[:, None]
            a = tl.load(at + one[None, :], mask=live & (one < D)[None, :], other=0.0)
            b = tl.load(at + two[None, :], mask=live & (two < D)[None, :], other=0.0)
            # Masked rows must not become minus the mean.
            a = tl.where(live, a.to(tl.float64) - mean_one[None, :], 0.0)
            b = tl.where(live, b.to(tl.float64) - mean_two[None, :], 0.0)
            total = tl.dot(tl.trans(a), b, total, out_dtype=tl.float64)
        at = out_ptr + z.to(tl.int64) * D * D + (one.to(tl.int64) * D)[:, None] + two[None, :]
        tl.store(at, total, mask=(one < D)[:, None] & (two < D)[None, :])


def _capability(x: Tensor) -> int:
    """Such as 90; what the interpreter runs is like sm_80."""
    if x.device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


@backends.on_its_device
def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    N, D = x.shape
    mean, scatter = statistics._made(x)
    if x.numel() == 0:
        return mean.zero_(), scatter.zero_()
    x = x.to(torch.float32)
    x = x if x.stride(1) == 1 else x.contiguous()
    torch.mean(x, 0, dtype=torch.float64, out=mean)
    config = LaunchConfig.for_shape(N, D, _capability(x))
    tiles, runs = triton.cdiv(D, config.block), triton.cdiv(N, config.run)
    parts = x.new_empty((runs, D, D), dtype=torch.float64)
    scatter_kernel[(tiles, tiles, runs)](
        x, mean, parts, N, D, x.stride(0), config.run,
        BLOCK=config.block, DEPTH=config.depth, num_warps=config.warps,
    )  # fmt: skip
    upper = parts[0] if runs == 1 else parts.sum(0)
    # What lies below the diagonal was not written, or is a tile's mirror image.
    scatter = upper.triu() + upper.triu(1).T
    if backends.verifying():
        statistics.verify("triton moments", x, mean, scatter)
    return mean, scatter


_library = torch.library.Library("etude", "FRAGMENT")
_library.impl("triton_moments", _moments, "CUDA")
if backends.interpreting():
    _library.impl("triton_moments", _moments, "CPU")


def builds() -> list[Build]:
    """Inception's 2048 features of 50,000 pictures, for `compiling`."""
    made = []
    for archs in ((80, 90), (100,)):
        config = LaunchConfig.for_shape(50_000, 2048, archs[0])
        types = {"x_ptr": "*fp32", "mean_ptr": "*fp64", "out_ptr": "*fp64"}
        types |= {"N": "i32", "D": "i32", "x_n": "i32", "run": "i32"}
        constants = {"BLOCK": config.block, "DEPTH": config.depth}
        aligned = ("N", "D", "x_n", "run")
        made.append(
            Build(
                "scatter D=2048", scatter_kernel, types, constants, aligned, config.warps,
                archs=archs,
            )
        )  # fmt: skip
    return made
