"""Triton twins of `activation.py`, registered on first use.

The elementwise kernels move 4 bytes per bfloat16 element forward and 6 backward and do a few dozen
operations on each: they are bound by memory, so a thread handles 16-byte vectors, a tile is wide
enough to use whole lines, and the exponential is one `exp2` per element. Sums over rows are left by
each program in partial[chunk, D] (float32) and added in order by a second kernel: no atomics, the
same bits in every run and on every GPU, because the chunks depend on the shape alone.

The product kernel is persistent: two programs per multiprocessor walk over the tiles of the output.
Where both fit (forward on sm_90 and sm_100: 128 registers, 96 KB), the epilogue of one overlaps the
loop of the other; flattening the two loops for one program instead costs the backward epilogue
more registers than there are. It has two epilogues: bias and GELU (forward), and GELU's slope with
partial sums of the bias' gradient (backward of the second linear layer). It takes 16-bit inputs;
sums are in float32.

TRITON_INTERPRET=1 runs the kernels in Python on CPU tensors (tests; float32 and float16 only: the
interpreter truncates where bfloat16 should round, and multiplies its bits instead of its values).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import backends
from .activation import (
    bias_gelu_backward_reference,
    bias_gelu_reference,
    flat,
    halves,
    linear_gelu_reference,
    mlp_reference,
    new_sums,
    new_swiglu,
    ops,
    refuse_second_derivative,
    register_gradients,
    swiglu_backward_reference,
    swiglu_reference,
)
from .compiling import Build
from .tensors import new_like


@dataclass(frozen=True)
class LaunchConfig:
    """How an elementwise kernel is launched for rows of D elements."""

    block: int  # columns of a tile
    rows: int  # rows of a tile
    warps: int
    chunk: int  # rows that one program of the backward kernel adds up

    @classmethod
    def for_shape(cls, N: int, D: int) -> "LaunchConfig":
        """A heuristic, not a measurement.

        16 bfloat16 elements per thread: two 16-byte loads of each tensor in flight. 512 columns
        divide the inner widths of the DiTs (1536, 3072, 4608) without a remainder. A chunk of 128
        rows makes the partial sums 1/64 of the bytes of one bfloat16 tensor, and still thousands
        of programs for the 65536 rows of a training step.
        """
        block = min(512, max(16, triton.next_power_of_2(D)))
        rows = max(1, 2048 // block)
        return cls(block, rows, 4, chunk=max(rows, 128))


@dataclass(frozen=True)
class ProductConfig:
    """Tiles of the product kernel."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64  # 128 bytes of bfloat16: one swizzled line of shared memory
    group: int = 8  # rows of tiles that share their columns of the weight in the L2 cache
    # 128x128 float32 sums are 64 registers per thread of 8 warps: the epilogue has room for the
    # pre-activation and an exponential. 4 warps would need 128 for the sums alone.
    warps: int = 8
    # 32 KB per stage: 96 KB leave a second stage of loads in flight behind the one in use, and fit
    # twice into a multiprocessor of sm_90 and sm_100.
    stages: int = 3

    @staticmethod
    def programs(x: Tensor, tiles: int) -> int:
        """Two programs per multiprocessor, at most one per tile."""
        if x.device.type != "cuda":
            return min(2, tiles)
        return min(2 * torch.cuda.get_device_properties(x.device).multi_processor_count, tiles)


@triton.jit
def _sigmoid_pair(x):
    """sigmoid(x) and 1 - sigmoid(x), both without overflow or cancellation; e^t = 2^(t log2 e)."""
    e = tl.exp2(tl.abs(x) * -1.4426950408889634)
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x < 0.0, smaller, larger), tl.where(x < 0.0, larger, smaller)


@triton.jit
def _gelu(z, TANH: tl.constexpr):
    """z sigmoid(2 u) or z Phi(z)."""
    if TANH:
        s, _ = _sigmoid_pair(z * (1.5957691216057308 + 0.07135481627260026 * z * z))
        return z * s
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_slope(z, TANH: tl.constexpr):
    if TANH:
        square = z * z
        s, rest = _sigmoid_pair(z * (1.5957691216057308 + 0.07135481627260026 * square))
        inner = z * (1.5957691216057308 + 3.0 * 0.07135481627260026 * square)
        # s (1 - s) vanishes long before z^3 overflows to infinity; their product would be NaN.
        both = s * rest
        return s + tl.where(both > 0.0, both * inner, 0.0)
    bell = tl.exp2(z * z * -0.7213475204444817) * 0.3989422804014327
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + tl.where(bell > 0.0, z * bell, 0.0)


@triton.jit
def bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, y_ptr, N, D, x_n,
    BIASED: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS rows and BLOCK columns."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows[:, None] < N) & (cols[None, :] < D)
    z = tl.load(x_ptr + rows[:, None] * x_n + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        z += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    y = _gelu(z, TANH).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], y, mask=mask)


@triton.jit
def bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr, N, D, dy_n, x_n,
    BIASED: tl.constexpr, TANH: tl.constexpr, SUMS: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """CHUNK rows of BLOCK columns, tile by tile: dx, and the columns' sums of it."""
    chunk = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    if BIASED:
        bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, CHUNK, ROWS):
        rows = chunk * CHUNK + start + tl.arange(0, ROWS)
        mask = (rows[:, None] < N) & inside[None, :]
        z = tl.load(x_ptr + rows[:, None] * x_n + cols[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + rows[:, None] * dy_n + cols[None, :], mask=mask, other=0.0)
        z = z.to(tl.float32)
        if BIASED:
            z += bias[None, :]
        dz = dy.to(tl.float32) * _gelu_slope(z, TANH)
        tl.store(
            dx_ptr + rows[:, None] * D + cols[None, :], dz.to(dx_ptr.dtype.element_ty), mask=mask
        )
        if SUMS:
            total += dz  # rows beyond N have dy = 0
    if SUMS:
        # Across the rows of the tile only once, at the end: it costs shared memory and a barrier.
        tl.store(partial_ptr + chunk * D + cols, tl.sum(total, axis=0), mask=inside)


@triton.jit
def column_sum_kernel(
    partial_ptr, out_ptr, chunks, D, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Second stage: BLOCK columns of partial (chunks, D), ROWS chunks at a time, in order."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, chunks, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows[:, None] < chunks) & (cols[None, :] < D)
        total += tl.load(partial_ptr + rows[:, None] * D + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def swiglu_fwd_kernel(
    gate_ptr, value_ptr, y_ptr, N, D, gate_n, value_n, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One tile; gate and value may be the halves of one tensor."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows[:, None] < N) & (cols[None, :] < D)
    gate = tl.load(gate_ptr + rows[:, None] * gate_n + cols[None, :], mask=mask, other=0.0)
    value = tl.load(value_ptr + rows[:, None] * value_n + cols[None, :], mask=mask, other=0.0)
    gate = gate.to(tl.float32)
    s, _ = _sigmoid_pair(gate)
    y = gate * s * value.to(tl.float32)
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_bwd_kernel(
    dy_ptr, gate_ptr, value_ptr, dgate_ptr, dvalue_ptr, N, D,
    dy_n, gate_n, value_n, dgate_n, dvalue_n, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile; the gradients may be the halves of one tensor, which saves joining them."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows[:, None] < N) & (cols[None, :] < D)
    dy = tl.load(dy_ptr + rows[:, None] * dy_n + cols[None, :], mask=mask, other=0.0)
    gate = tl.load(gate_ptr + rows[:, None] * gate_n + cols[None, :], mask=mask, other=0.0)
    value = tl.load(value_ptr + rows[:, None] * value_n + cols[None, :], mask=mask, other=0.0)
    dy = dy.to(tl.float32)
    gate = gate.to(tl.float32)
    s, rest = _sigmoid_pair(gate)
    dvalue = dy * gate * s
    dgate = dy * value.to(tl.float32) * s * (1.0 + gate * rest)
    kind = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + rows[:, None] * dgate_n + cols[None, :], dgate.to(kind), mask=mask)
    tl.store(dvalue_ptr + rows[:, None] * dvalue_n + cols[None, :], dvalue.to(kind), mask=mask)


@triton.jit
def _epilogue(
    total, bias_ptr, z_ptr, out_ptr, partial_ptr, tile_m, first, M, N,
    BACKWARD: tl.constexpr, BIASED: tl.constexpr, TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What follows the product for the columns from `first` on of one tile."""
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = first + tl.arange(0, BLOCK_N)
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    kind = out_ptr.dtype.element_ty
    if BACKWARD:
        z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dz = tl.where(mask, total * _gelu_slope(z, TANH), 0.0)
        tl.store(out_ptr + at, dz.to(kind), mask=mask)
        sums = tl.sum(dz, axis=0)
        tl.store(partial_ptr + tile_m.to(tl.int64) * N + cols, sums, mask=cols < N)
    else:
        if BIASED:
            total += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        # GELU of z as it is stored, so that forward and backward see the same values.
        z = total.to(kind)
        tl.store(z_ptr + at, z, mask=mask)
        tl.store(out_ptr + at, _gelu(z.to(tl.float32), TANH).to(kind), mask=mask)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, bias_ptr, z_ptr, out_ptr, partial_ptr, M, N, K, a_m, b_k, b_n,
    BACKWARD: tl.constexpr, BIASED: tl.constexpr, TANH: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a (M, K) times b (K, N, by its strides), tile by tile, with one of two epilogues.

    Forward: z = a b + bias, out = gelu(z); both are written, since backward needs z and the second
    layer's weight gradient needs out. Backward: out = (a b) gelu'(z), and its sums over the rows of
    each tile to partial (tiles of M, N).
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        # GROUP rows of tiles are walked column by column, so that neighbours in time share both
        # their rows of a and their columns of b in the L2 cache.
        width = GROUP * tiles_n
        first = tile // width * GROUP
        height = min(tiles_m - first, GROUP)
        tile_m = first + tile % width % height
        tile_n = tile % width // height
        # Rows beyond the end repeat the last one: their results are not stored, and only the loop's
        # dimension needs a mask. So do columns forward, where they are the weight's rows; backward
        # they are its contiguous dimension, of which a minimum would hide that it is contiguous,
        # and 16-byte loads would become 2-byte ones.
        a_tile = a_ptr + tile_m.to(tl.int64) * BLOCK_M * a_m
        b_tile = b_ptr + tile_n.to(tl.int64) * BLOCK_N * b_n
        near_rows = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - tile_m * BLOCK_M)
        cols = tl.arange(0, BLOCK_N)
        near_cols = cols if BACKWARD else tl.minimum(cols, N - 1 - tile_n * BLOCK_N)
        steps = tl.arange(0, BLOCK_K)
        a_at = a_tile + near_rows[:, None] * a_m + steps[None, :]
        b_at = b_tile + steps[:, None] * b_k + near_cols[None, :] * b_n
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            inside = steps < K - k * BLOCK_K
            a = tl.load(a_at, mask=inside[None, :], other=0.0)
            wanted = inside[:, None]
            if BACKWARD:
                wanted = wanted & (cols < N - tile_n * BLOCK_N)[None, :]
            b = tl.load(b_at, mask=wanted, other=0.0)
            a_at += BLOCK_K
            b_at += BLOCK_K * b_k
            total = tl.dot(a, b, total)
        # In two halves of the columns: the epilogue then has half as many values in registers
        # beside the sums.
        pair = tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(pair)
        _epilogue(
            left, bias_ptr, z_ptr, out_ptr, partial_ptr, tile_m, tile_n * BLOCK_N, M, N,
            BACKWARD, BIASED, TANH, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        _epilogue(
            right, bias_ptr, z_ptr, out_ptr, partial_ptr, tile_m, tile_n * BLOCK_N + BLOCK_N // 2,
            M, N, BACKWARD, BIASED, TANH, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip


def _column_sums(partial: Tensor, out: Tensor) -> None:
    chunks, D = partial.shape
    wrap_triton(column_sum_kernel)[(triton.cdiv(D, 64),)](
        partial, out, chunks, D, ROWS=16, BLOCK=64, num_warps=4
    )


@triton_op("etude::triton_bias_gelu", mutates_args={})
@backends.on_its_device
def _bias_gelu(x: Tensor, bias: Tensor | None, tanh: bool, out_dtype: torch.dtype | None) -> Tensor:
    y = new_like(x, out_dtype)
    if x.numel() == 0:
        return y
    rows = flat(x)
    N, D = rows.shape
    config = LaunchConfig.for_shape(N, D)
    wrap_triton(bias_gelu_fwd_kernel)[(triton.cdiv(N, config.rows), triton.cdiv(D, config.block))](
        rows, rows if bias is None else bias.contiguous(), y, N, D, rows.stride(0),
        BIASED=bias is not None, TANH=tanh, ROWS=config.rows, BLOCK=config.block,
        num_warps=config.warps,
    )  # fmt: skip
    if backends.verifying():
        want = bias_gelu_reference(x, bias, "tanh" if tanh else "none", out_dtype=out_dtype)
        backends.verify("triton bias_gelu", ("y",), (y,), (want,))
    return y


@triton_op("etude::triton_bias_gelu_backward", mutates_args={})
@backends.on_its_device
def _bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, sums: bool
) -> tuple[Tensor, Tensor]:
    dx, dbias = new_like(x), new_sums(x, bias, sums)
    if x.numel() == 0:
        return dx, torch.zeros_like(dbias)
    grad, rows = flat(dy), flat(x)
    N, D = rows.shape
    config = LaunchConfig.for_shape(N, D)
    chunks = triton.cdiv(N, config.chunk)
    partial = x.new_empty((chunks if sums else 1, D), dtype=torch.float32)
    wrap_triton(bias_gelu_bwd_kernel)[(chunks, triton.cdiv(D, config.block))](
        grad, rows, rows if bias is None else bias.contiguous(), dx, partial,
        N, D, grad.stride(0), rows.stride(0), BIASED=bias is not None, TANH=tanh, SUMS=sums,
        CHUNK=config.chunk, ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip
    if sums:
        _column_sums(partial, dbias)
    if backends.verifying():
        want = bias_gelu_backward_reference(dy, x, bias, tanh)
        made = dx, dbias if sums else None
        backends.verify("triton bias_gelu_backward", ("dx", "dbias"), made, want)
    return dx, dbias


@triton_op("etude::triton_swiglu", mutates_args={})
@backends.on_its_device
def _swiglu(x: Tensor, value: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    y = new_swiglu(x, value, out_dtype)
    if y.numel() == 0:
        return y
    gate, other = halves(x, value)
    N, D = gate.shape
    config = LaunchConfig.for_shape(N, D)
    wrap_triton(swiglu_fwd_kernel)[(triton.cdiv(N, config.rows), triton.cdiv(D, config.block))](
        gate, other, y, N, D, gate.stride(0), other.stride(0),
        ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip
    if backends.verifying():
        want = swiglu_reference(x, value, out_dtype=out_dtype)
        backends.verify("triton swiglu", ("y",), (y,), (want,))
    return y


@triton_op("etude::triton_swiglu_backward", mutates_args={})
@backends.on_its_device
def _swiglu_backward(dy: Tensor, x: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
    dx = new_like(x)
    dvalue = x.new_empty(0) if value is None else new_like(value)
    if dy.numel() == 0:
        return dx, dvalue
    grad, (gate, other) = flat(dy), halves(x, value)
    dgate, dother = halves(dx, None if value is None else dvalue)
    N, D = gate.shape
    config = LaunchConfig.for_shape(N, D)
    tensors = (grad, gate, other, dgate, dother)
    wrap_triton(swiglu_bwd_kernel)[(triton.cdiv(N, config.rows), triton.cdiv(D, config.block))](
        *tensors, N, D, *(t.stride(0) for t in tensors),
        ROWS=config.rows, BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip
    if backends.verifying():
        want = swiglu_backward_reference(dy, x, value)
        names = ("dx", "dvalue")[: len(want)]
        backends.verify("triton swiglu_backward", names, (dx, dvalue)[: len(want)], want)
    return dx, dvalue


def _product(
    a: Tensor, b: Tensor, b_k: int, b_n: int, bias: Tensor | None, z: Tensor, out: Tensor,
    partial: Tensor, backward: bool, tanh: bool,
) -> None:  # fmt: skip
    """Launch the product of a (M, K) and b (K, N) into out (M, N); see `product_kernel`."""
    (M, K), N = a.shape, out.shape[1]
    config = ProductConfig()
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    wrap_triton(product_kernel)[(config.programs(a, tiles),)](
        a, b, a if bias is None else bias, z, out, partial, M, N, K, a.stride(0), b_k, b_n,
        BACKWARD=backward, BIASED=bias is not None, TANH=tanh, GROUP=config.group,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor]:
    """(y, z) of shape (..., N)."""
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    z = new_like(y)
    if y.numel() == 0:
        return y, z
    rows, weight = flat(x), weight.contiguous()
    N = weight.shape[0]
    bias = None if bias is None else bias.contiguous()
    b_n, b_k = weight.stride()
    _product(
        rows, weight, b_k, b_n, bias, z.view(-1, N), y.view(-1, N),
        rows.new_empty(1, dtype=torch.float32), False, tanh,
    )  # fmt: skip
    return y, z


@triton_op("etude::triton_linear_gelu", mutates_args={})
@backends.on_its_device
def _linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor]:
    """(y, z): y = gelu(z) and z = x weight^T + bias, kept for backward."""
    y, z = _linear_forward(x, weight, bias, tanh)
    if backends.verifying():
        want = linear_gelu_reference(x, weight, bias, "tanh" if tanh else "none")
        backends.verify("triton linear_gelu", ("y",), (y,), (want,))
    return y, z


@triton_op("etude::triton_mlp", mutates_args={})
@backends.on_its_device
def _mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, z, hidden): hidden = gelu(z). Keeping both costs the bytes that eager autograd keeps;
    recomputing the hidden layer would read z and write hidden once more in backward."""
    hidden, z = _linear_forward(x, w1, b1, tanh)
    y = torch.nn.functional.linear(hidden, w2, b2)
    if backends.verifying():
        want = mlp_reference(x, w1, b1, w2, b2, "tanh" if tanh else "none")
        backends.verify("triton mlp", ("y",), (y,), (want,))
    return y, z, hidden


@triton_op("etude::triton_mlp_hidden_backward", mutates_args={})
@backends.on_its_device
def _mlp_hidden_backward(dy: Tensor, w2: Tensor, z: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """(dz, db1) of the hidden layer: dz = (dy w2) gelu'(z), db1 its sums over rows."""
    dz, db1 = new_like(z), z.new_empty(z.shape[-1])
    if dz.numel() == 0:
        return dz, torch.zeros_like(db1)
    N = z.shape[-1]
    rows, w2 = flat(dy), w2.contiguous()
    config = ProductConfig()
    partial = z.new_empty((triton.cdiv(z.numel() // N, config.block_m), N), dtype=torch.float32)
    b_k, b_n = w2.stride()
    _product(
        rows, w2, b_k, b_n, None, z.contiguous().view(-1, N), dz.view(-1, N), partial, True, tanh
    )
    _column_sums(partial, db1)
    if backends.verifying():
        grad = torch.mm(rows.float(), w2.float()).view(z.shape)
        want = bias_gelu_backward_reference(grad, z, None, tanh)
        backends.verify("triton mlp_hidden_backward", ("dz", "db1"), (dz, db1), want)
    return dz, db1


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return torch.mm(flat(dy).t(), flat(x))


def _register_products() -> None:
    def linear_context(ctx, inputs, output) -> None:
        x, weight, bias, ctx.tanh = inputs
        ctx.biased = bias is not None
        ctx.save_for_backward(x, weight, output[1])

    def linear_backward(ctx, dy, dz_unused):
        x, weight, z = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        sums = ctx.biased and need_bias
        dz, db = ops.triton_bias_gelu_backward(dy, z, None, ctx.tanh, sums)
        dx = torch.matmul(dz, weight) if need_x else None
        dw = _weight_gradient(dz, x) if need_weight else None
        return dx, dw, db if sums else None, None

    def mlp_context(ctx, inputs, output) -> None:
        x, w1, b1, w2, b2, ctx.tanh = inputs
        ctx.biased = b1 is not None, b2 is not None
        ctx.save_for_backward(x, w1, w2, *output[1:])

    def mlp_backward(ctx, dy, dz_unused, dhidden_unused):
        x, w1, w2, z, hidden = ctx.saved_tensors
        need = ctx.needs_input_grad
        dz, db1 = ops.triton_mlp_hidden_backward(dy, w2, z, ctx.tanh)
        dx = torch.matmul(dz, w1) if need[0] else None
        dw1 = _weight_gradient(dz, x) if need[1] else None
        dw2 = _weight_gradient(dy, hidden) if need[3] else None
        db2 = flat(dy).sum(0) if ctx.biased[1] and need[4] else None
        return dx, dw1, db1 if ctx.biased[0] else None, dw2, db2, None

    register = torch.library.register_autograd
    register("etude::triton_linear_gelu", linear_backward, setup_context=linear_context)
    register("etude::triton_mlp", mlp_backward, setup_context=mlp_context)
    refuse_second_derivative("triton_mlp_hidden_backward")


register_gradients("triton_")
_register_products()


def builds() -> list[Build]:
    """The launches of DiT-XL/2's MLP (1152 to 4608 and back) in bfloat16, for `compiling`."""
    width, inner = 1152, 4608
    e = LaunchConfig.for_shape(65536, inner)
    p = ProductConfig()
    tile = {"ROWS": e.rows, "BLOCK": e.block}
    gelu = tile | {"BIASED": True, "TANH": True}
    product = {
        "TANH": True, "GROUP": p.group, "BLOCK_M": p.block_m, "BLOCK_N": p.block_n,
        "BLOCK_K": p.block_k,
    }  # fmt: skip
    forward = product | {"BACKWARD": False, "BIASED": True, "b_k": 1}
    backward = product | {"BACKWARD": True, "BIASED": False, "b_n": 1}
    sums = {"SUMS": True, "CHUNK": e.chunk}
    listed = (
        (f"bias_gelu forward D={inner}", bias_gelu_fwd_kernel, gelu, e.warps, 3),
        (f"bias_gelu forward erf D={inner}", bias_gelu_fwd_kernel, gelu | {"TANH": False}, 4, 3),
        (f"bias_gelu backward D={inner}", bias_gelu_bwd_kernel, gelu | sums, e.warps, 3),
        (
            f"bias_gelu backward erf D={inner}",
            bias_gelu_bwd_kernel,
            gelu | sums | {"TANH": False},
            e.warps,
            3,
        ),
        (f"column sums D={inner}", column_sum_kernel, {"ROWS": 16, "BLOCK": 64}, 4, 3),
        (f"swiglu forward D={inner}", swiglu_fwd_kernel, tile, e.warps, 3),
        (f"swiglu backward D={inner}", swiglu_bwd_kernel, tile, e.warps, 3),
        (f"product gelu {width}x{inner}", product_kernel, forward, p.warps, p.stages),
        (f"product gelu backward {width}x{inner}", product_kernel, backward, p.warps, p.stages),
    )
    made = []
    for name, kernel, constants, warps, stages in listed:
        free = [n for n in kernel.arg_names if n not in constants]
        types = {n: "i32" for n in free}
        types |= {n: "*bf16" for n in free if n.endswith("_ptr")}
        types |= {n: "*fp32" for n in free if n == "partial_ptr"}
        aligned = tuple(n for n in free if not n.endswith("_ptr") and n != "chunks")
        made.append(Build(name, kernel, types, constants, aligned, warps, stages))
    return made
