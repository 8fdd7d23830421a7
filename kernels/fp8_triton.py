"""Triton twin of `fp8.adaln_modulate_fp8`, registered on first use.

The forward kernel of `adaln_triton.py`, in the same two pieces per row and one warp per row, with
one more maximum over the row: the modulated row is in registers anyway, so its scale and its 8-bit
values cost one more shuffle reduction and one byte per element, where a kernel of its own would
read the row again. float8_e4m3fn exists from compute capability 8.9 on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import backends
from .adaln import NORMS, ops
from .adaln_triton import (
    LaunchConfig,
    _centred,
    _mask,
    _stream,
    _vector,
    config_of,
)
from .compiling import Build
from .fp8 import E4M3, adaln_modulate_fp8_reference
from .tensors import dense


@triton.jit
def _modulated(
    centred, rstd, shift_ptr, scale_ptr, b, shift_b, scale_b, cols, D, EXACT: tl.constexpr
):  # fmt: skip
    shift = _vector(shift_ptr, b, shift_b, cols, D, EXACT)
    scale = _vector(scale_ptr, b, scale_b, cols, D, EXACT)
    return centred * rstd[:, None] * (1.0 + scale) + shift


@triton.jit
def _emit(
    y, inverse, y_ptr, values_ptr, at, live, cols, D, KEEP: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """Stores y where KEEP, and y * inverse within the range of the 8-bit type; NaN stays NaN."""
    mask = _mask(live, cols, D, EXACT)
    offsets = at[:, None] + cols[None, :]
    if KEEP:
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    nan: tl.constexpr = tl.PropagateNan.ALL
    scaled = tl.maximum(y * inverse[:, None], -448.0, propagate_nan=nan)
    scaled = tl.minimum(scaled, 448.0, propagate_nan=nan)
    tl.store(values_ptr + offsets, scaled.to(values_ptr.dtype.element_ty), mask=mask)


@triton.jit
def adaln_fp8_kernel(
    x_ptr, shift_ptr, scale_ptr, y_ptr, values_ptr, row_scale_ptr, mean_ptr, rstd_ptr,
    N, D, x_b, x_n, shift_b, scale_b, tiles, eps,
    KEEP: tl.constexpr, RMS: tl.constexpr, TILE: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """TILE rows of sample b: the norm, its modulation, and the rows in 8 bits."""
    program = tl.program_id(0).to(tl.int64)
    b = program // tiles
    n = (program % tiles) * TILE + tl.arange(0, TILE)
    live = n < N
    x_at, out_at = b * x_b + n * x_n, (b * N + n) * D
    exact_a: tl.constexpr = EXACT or BLOCK_B > 0
    cols_a = tl.arange(0, BLOCK_A)
    xa = _stream(
        x_ptr, x_ptr, x_ptr, x_ptr, x_ptr, x_at, x_at, out_at, b, 0, live, cols_a, D,
        False, False, exact_a,
    )  # fmt: skip
    mean = tl.sum(xa, axis=1)
    if BLOCK_B > 0:
        cols_b = BLOCK_A + tl.arange(0, BLOCK_B)
        xb = _stream(
            x_ptr, x_ptr, x_ptr, x_ptr, x_ptr, x_at, x_at, out_at, b, 0, live, cols_b, D,
            False, False, EXACT,
        )  # fmt: skip
        mean += tl.sum(xb, axis=1)
    mean = mean / D
    if RMS:
        mean = mean * 0.0
    xa = _centred(xa, mean, cols_a, D, RMS, exact_a)
    squares = tl.sum(xa * xa, axis=1)
    if BLOCK_B > 0:
        xb = _centred(xb, mean, cols_b, D, RMS, EXACT)
        squares += tl.sum(xb * xb, axis=1)
    rstd = 1.0 / tl.sqrt(squares / D + eps)
    # Columns that do not exist load zeros for x, shift and scale: they are 0 in the maximum.
    ya = _modulated(xa, rstd, shift_ptr, scale_ptr, b, shift_b, scale_b, cols_a, D, exact_a)
    largest = tl.max(tl.abs(ya), axis=1)
    if BLOCK_B > 0:
        yb = _modulated(xb, rstd, shift_ptr, scale_ptr, b, shift_b, scale_b, cols_b, D, EXACT)
        largest = tl.maximum(largest, tl.max(tl.abs(yb), axis=1))
    row_scale = tl.where(largest > 1e-35, largest / 448.0, 1.0)  # fp8.SMALLEST
    inverse = 1.0 / row_scale
    _emit(ya, inverse, y_ptr, values_ptr, out_at, live, cols_a, D, KEEP, exact_a)
    if BLOCK_B > 0:
        _emit(yb, inverse, y_ptr, values_ptr, out_at, live, cols_b, D, KEEP, EXACT)
    tl.store(row_scale_ptr + b * N + n, row_scale, mask=live)
    tl.store(mean_ptr + b * N + n, mean, mask=live)
    tl.store(rstd_ptr + b * N + n, rstd, mask=live)


def launch(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype | None,
    keep: bool,
    values_dtype: torch.dtype = E4M3,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, values, row_scale, mean, rstd); y is empty unless `keep`.

    values_dtype float32 leaves out the cast to 8 bits, which the interpreter rounds wrongly.
    """
    B, N, D = x.shape
    y = x.new_empty(x.shape if keep else (0,), dtype=out_dtype or x.dtype)
    values = x.new_empty(x.shape, dtype=values_dtype)
    row_scale, mean, rstd = (x.new_empty((B, N), dtype=torch.float32) for _ in range(3))
    if x.numel() == 0:
        return y, values, row_scale.fill_(1.0), mean.zero_(), rstd.zero_()
    x, shift, scale = dense(x), dense(shift), dense(scale)
    config = config_of(x)
    tiles = triton.cdiv(N, config.tile)
    wrap_triton(adaln_fp8_kernel)[(B * tiles,)](
        x, shift, scale, y if keep else x, values, row_scale, mean, rstd,
        N, D, x.stride(0), x.stride(1), shift.stride(0), scale.stride(0), tiles, eps,
        KEEP=keep, RMS=rms, TILE=config.tile, BLOCK_A=config.block_a, BLOCK_B=config.block_b,
        EXACT=config.exact, num_warps=config.warps,
    )  # fmt: skip
    return y, values, row_scale, mean, rstd


@triton_op("etude::triton_adaln_modulate_fp8", mutates_args={})
@backends.on_its_device
def _operator(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = launch(x, shift, scale, eps, rms, out_dtype, keep)
    if backends.verifying():
        values, row_scale, y = adaln_modulate_fp8_reference(
            x, shift, scale, eps=eps, norm=NORMS[rms], out_dtype=out_dtype
        )
        names = ("y", "scale")
        backends.verify("triton adaln_modulate_fp8", names, made[:3:2], (y, row_scale))
        # Two roundings may fall to neighbouring 8-bit numbers, one step of 2^-3 apart.
        got, want = made[1].float(), values.float()
        if not bool(((got - want).abs() <= 0.126 * want.abs() + 0.002).all()):
            raise AssertionError("ETUDE_VERIFY: triton adaln_modulate_fp8: values differ")
    return made


def _context(ctx, inputs, output) -> None:
    x, _, scale, ctx.eps, ctx.rms, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, output[3], output[4])


def _gradient(ctx, dy, *others):
    """That of `adaln_modulate`: what is rounded to 8 bits has no gradient of its own."""
    x, scale, mean, rstd = ctx.saved_tensors
    if dy is None:
        return (None,) * 7
    dx, dmod = ops.triton_adaln_modulate_backward(dy, x, scale, mean, rstd, ctx.eps, ctx.rms)
    return dx, *dmod.unbind(1), None, None, None, None


torch.library.register_autograd(
    "etude::triton_adaln_modulate_fp8", _gradient, setup_context=_context
)


def builds() -> list[Build]:
    """Launches of DiT-B, XL and a width with a mask in bfloat16, for GPUs that have the type."""
    made = []
    wide = ("row_scale_ptr", "mean_ptr", "rstd_ptr")
    for D, keep in ((768, True), (1152, True), (1152, False), (199, True)):
        c = LaunchConfig.for_shape(256, 256, D)
        constants = {"KEEP": keep, "RMS": False, "TILE": c.tile, "EXACT": c.exact}
        constants |= {"BLOCK_A": c.block_a, "BLOCK_B": c.block_b}
        free = [n for n in adaln_fp8_kernel.arg_names if n not in constants]
        types = {n: "fp32" if n == "eps" else "i32" for n in free}
        types |= {n: "*fp32" if n in wide else "*bf16" for n in free if n.endswith("_ptr")}
        types["values_ptr"] = "*fp8e4nv"
        strides = ("D", "x_b", "x_n", "shift_b", "scale_b")
        aligned = strides if D % 16 == 0 else ()
        name = f"forward D={D}" + " inference" * (not keep)
        made.append(
            Build(name, adaln_fp8_kernel, types, constants, aligned, c.warps, archs=(90, 100))
        )
    return made
