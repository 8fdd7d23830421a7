"""Triton twins of `adaln.py`: the same operators for CUDA tensors, registered on first use.

These kernels do some ten operations per element and are bound by memory: what counts is that every
byte is moved once, in 16-byte pieces, with enough of them in flight. How that is done:

* A row of width 1152 masked to the next power of two would leave 44% of the lanes idle. A row is
  two register tensors instead, 1024 and 128 columns (`LaunchConfig.split`), which covers every
  width of the DiT family (384, 768, 1152, 1536, ...) exactly, without a column mask.
* Forward, one warp takes a row (or several short ones of one sample): the mean and the variance are
  shuffles, without shared memory or a barrier, and every load is 8 or 16 bytes a lane.
* Backward, a program walks over `rows` rows of one sample with the sums of dgate, dshift and dscale
  in registers, shared by as many warps as that takes. The rows to come are copied into shared
  memory asynchronously, two ahead (`stages`): registers hold sums, not data in flight (121 of them
  with one row ahead, 96 with two, on sm_90).
* Sums go to partial[b, chunk, 4, D] (float32); `reduce_kernel` adds the chunks in order and writes
  the gradient of the packed modulation once; `bias_kernel` adds the samples in order. No atomics:
  the same bits in every run on one kind of GPU (the number of chunks is chosen from its number of
  multiprocessors).

Addresses are int64, arithmetic is float32, D is masked where the pieces do not cover it exactly.

TRITON_INTERPRET=1 runs the kernels in Python on CPU tensors (tests; float32 and float16 only: the
interpreter truncates where bfloat16 should round).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import backends
from .adaln import (
    implementations,
    new_gradients,
    new_outputs,
    register_gradients,
    verify_backward,
    verify_forward,
)
from .compiling import Build
from .tensors import dense

# Of an H200 and H100; `for_shape` is given the real number.
_SMS = 132


@dataclass(frozen=True)
class LaunchConfig:
    """How the kernels are launched for x: (B, N, D). A heuristic, not a measurement."""

    block_a: int  # columns of a row's first piece, a power of two
    block_b: int  # columns of its second piece; 0: there is none
    exact: bool  # whether the pieces are the row, so that no column needs a mask
    tile: int  # rows of a forward program, all of one sample
    warps: int
    rows: int  # rows of a backward program, one after the other, all of one sample
    backward_warps: int
    stages: int = 3  # the loads of two more rows are in flight

    @staticmethod
    def split(D: int) -> tuple[int, int]:
        """Two powers of two that cover D, where they leave fewer idle lanes than one."""
        whole = max(16, triton.next_power_of_2(D))
        first = whole // 2
        second = max(16, triton.next_power_of_2(D - first))
        return (first, second) if first > 32 and first + second < whole else (whole, 0)

    @classmethod
    @lru_cache(maxsize=1024)
    def for_shape(cls, B: int, N: int, D: int, sms: int = _SMS) -> "LaunchConfig":
        a, b = cls.split(D)
        width = a + b
        # Forward: one warp holds a row of up to 1536 columns (48 a lane, 85 registers on sm_90), so
        # its mean and variance are shuffles, without shared memory or a barrier; several rows where
        # they are short, so that a warp has some kilobytes in flight.
        tile = _power_below(min(N, 8, 1024 // width))
        warps = min(16, triton.next_power_of_2(triton.cdiv(width, 1536)))
        # Backward: 5 to 12 columns a thread, as it holds five values per column from row to row
        # (three sums, gate and scale; six with a bias). More threads, more to exchange per row.
        backward_warps = min(16, triton.next_power_of_2(triton.cdiv(width, 384)))
        # At some 128 registers a thread a multiprocessor holds 16 warps.
        rows = _rows_per_program(B, N, sms * (16 // backward_warps))
        return cls(a, b, width == D, tile, warps, rows, backward_warps)


def _power_below(value: int) -> int:
    """The largest power of two that is at most `value`; 1 for 0."""
    return 1 << (max(1, value).bit_length() - 1)


def _rows_per_program(B: int, N: int, slots: int) -> int:
    """Rows of a backward program, so that the last wave of programs is not a ragged one.

    `slots` programs run at a time, and each takes the time of its rows and of about four more, to
    read the modulation and to write the sums. The cheapest number of programs per sample is taken,
    the smaller one (fewer sums to write and add) among equals: for B = 256, N = 256, D = 1152 on
    132 multiprocessors 2 of 128 rows, 0.97 waves of 528. A program never mixes two samples.
    """
    best, cost = N, None
    for chunks in range(1, triton.cdiv(N, 4) + 1):
        rows = triton.cdiv(N, chunks)
        time = triton.cdiv(B * triton.cdiv(N, rows), slots) * (rows + 4)
        if cost is None or time < cost:
            best, cost = rows, time
    return best


@triton.jit
def _mask(live, cols, D, EXACT: tl.constexpr):
    """Of a tile: the rows that exist, and the columns unless all of them do."""
    mask = live[:, None]
    if not EXACT:
        mask = mask & (cols < D)[None, :]
    return mask


@triton.jit
def _vector(ptr, b, stride, cols, D, EXACT: tl.constexpr):
    """One sample's gate, shift or scale as a row (1, BLOCK) of float32."""
    at = ptr + b * stride + cols[None, :]
    if EXACT:
        value = tl.load(at)
    else:
        value = tl.load(at, mask=(cols < D)[None, :], other=0.0)
    return value.to(tl.float32)


@triton.jit
def _stream(
    x_ptr, h_ptr, gate_ptr, bias_ptr, out_ptr, x_at, h_at, out_at, b, gate_b, live, cols, D,
    GATED: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of x, with the gated branch added and stored where there is one; float32."""
    mask = _mask(live, cols, D, EXACT)
    x = tl.load(x_ptr + x_at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if GATED:
        h = tl.load(h_ptr + h_at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            h += _vector(bias_ptr, 0, 0, cols, D, EXACT)
        gate = _vector(gate_ptr, b, gate_b, cols, D, EXACT)
        # Rounded as it is stored, so that backward normalises the same values.
        out = (x + gate * h).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_at[:, None] + cols[None, :], out, mask=mask)
        x = out.to(tl.float32)
    return x


@triton.jit
def _centred(x, mean, cols, D, RMS: tl.constexpr, EXACT: tl.constexpr):
    """x - mean, zero in the columns that do not exist."""
    if not RMS:
        x -= mean[:, None]
        if not EXACT:
            x = tl.where((cols < D)[None, :], x, 0.0)
    return x


@triton.jit
def _modulate(
    centred, rstd, shift_ptr, scale_ptr, y_ptr, out_at, b, shift_b, scale_b, live, cols, D,
    EXACT: tl.constexpr,
):  # fmt: skip
    shift = _vector(shift_ptr, b, shift_b, cols, D, EXACT)
    scale = _vector(scale_ptr, b, scale_b, cols, D, EXACT)
    y = centred * rstd[:, None] * (1.0 + scale) + shift
    mask = _mask(live, cols, D, EXACT)
    tl.store(y_ptr + out_at[:, None] + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def adaln_fwd_kernel(
    x_ptr, h_ptr, gate_ptr, shift_ptr, scale_ptr, bias_ptr, out_ptr, y_ptr, mean_ptr, rstd_ptr,
    N, D, x_b, x_n, h_b, h_n, gate_b, shift_b, scale_b, tiles, eps,
    GATED: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr, RMS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """TILE rows of sample b: out = x + gate * (h + bias) where GATED, then y where NORMED."""
    program = tl.program_id(0).to(tl.int64)
    b = program // tiles
    n = (program % tiles) * TILE + tl.arange(0, TILE)
    live = n < N
    x_at, h_at, out_at = b * x_b + n * x_n, b * h_b + n * h_n, (b * N + n) * D
    cols_a = tl.arange(0, BLOCK_A)
    xa = _stream(
        x_ptr, h_ptr, gate_ptr, bias_ptr, out_ptr, x_at, h_at, out_at, b, gate_b, live, cols_a, D,
        GATED, BIAS, EXACT or BLOCK_B > 0,
    )  # fmt: skip
    if BLOCK_B > 0:
        cols_b = BLOCK_A + tl.arange(0, BLOCK_B)
        xb = _stream(
            x_ptr, h_ptr, gate_ptr, bias_ptr, out_ptr, x_at, h_at, out_at, b, gate_b, live, cols_b,
            D, GATED, BIAS, EXACT,
        )  # fmt: skip
    if NORMED:
        mean = tl.zeros([TILE], dtype=tl.float32)
        if not RMS:
            mean = tl.sum(xa, axis=1)
            if BLOCK_B > 0:
                mean += tl.sum(xb, axis=1)
            mean = mean / D
        # The variance of the centred row: a large mean does not cancel it.
        xa = _centred(xa, mean, cols_a, D, RMS, EXACT or BLOCK_B > 0)
        squares = tl.sum(xa * xa, axis=1)
        if BLOCK_B > 0:
            xb = _centred(xb, mean, cols_b, D, RMS, EXACT)
            squares += tl.sum(xb * xb, axis=1)
        rstd = 1.0 / tl.sqrt(squares / D + eps)
        _modulate(
            xa, rstd, shift_ptr, scale_ptr, y_ptr, out_at, b, shift_b, scale_b, live, cols_a, D,
            EXACT or BLOCK_B > 0,
        )  # fmt: skip
        if BLOCK_B > 0:
            _modulate(
                xb, rstd, shift_ptr, scale_ptr, y_ptr, out_at, b, shift_b, scale_b, live, cols_b, D,
                EXACT,
            )  # fmt: skip
        tl.store(mean_ptr + b * N + n, mean, mask=live)
        tl.store(rstd_ptr + b * N + n, rstd, mask=live)


@triton.jit
def _row(ptr, at, cols, D, EXACT: tl.constexpr):
    """One row, or one sample's vector, as float32 (BLOCK,); zero in columns that do not exist."""
    if EXACT:
        row = tl.load(ptr + at + cols)
    else:
        row = tl.load(ptr + at + cols, mask=cols < D, other=0.0)
    return row.to(tl.float32)


@triton.jit
def _save(ptr, at, row, cols, D, EXACT: tl.constexpr):
    if EXACT:
        tl.store(ptr + at + cols, row.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + at + cols, row.to(ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def adaln_bwd_kernel(
    dout_ptr, dy_ptr, x_ptr, h_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dh_ptr, partial_ptr,
    N, D, dout_b, dout_n, dy_b, dy_n, x_b, x_n, h_b, h_n, gate_b, scale_b, chunks, rows,
    GATED: tl.constexpr, NORMED: tl.constexpr, HAS_DOUT: tl.constexpr, BIAS: tl.constexpr,
    RMS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`rows` rows of sample b: dx, dh, and this chunk's sums of dgate, dshift, dscale and dx."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    first = (program % chunks) * rows
    split: tl.constexpr = BLOCK_B > 0
    exact_a: tl.constexpr = EXACT or split  # the first of two pieces is always full
    cols_a = tl.arange(0, BLOCK_A)
    dgate_a = tl.zeros([BLOCK_A], dtype=tl.float32)
    dshift_a = tl.zeros([BLOCK_A], dtype=tl.float32)
    dscale_a = tl.zeros([BLOCK_A], dtype=tl.float32)
    sum_a = tl.zeros([BLOCK_A], dtype=tl.float32)
    if split:
        cols_b = BLOCK_A + tl.arange(0, BLOCK_B)
        dgate_b = tl.zeros([BLOCK_B], dtype=tl.float32)
        dshift_b = tl.zeros([BLOCK_B], dtype=tl.float32)
        dscale_b = tl.zeros([BLOCK_B], dtype=tl.float32)
        sum_b = tl.zeros([BLOCK_B], dtype=tl.float32)
    if NORMED:
        factor_a = 1.0 + _row(scale_ptr, b * scale_b, cols_a, D, exact_a)
        if split:
            factor_b = 1.0 + _row(scale_ptr, b * scale_b, cols_b, D, EXACT)
    if GATED:
        gate_a = _row(gate_ptr, b * gate_b, cols_a, D, exact_a)
        if split:
            gate_b_ = _row(gate_ptr, b * gate_b, cols_b, D, EXACT)
    for i in tl.range(0, tl.minimum(rows, N - first).to(tl.int32), num_stages=STAGES):
        n = first + i
        row = b * N + n
        total_a = tl.zeros([BLOCK_A], dtype=tl.float32)
        if HAS_DOUT:
            total_a = _row(dout_ptr, b * dout_b + n * dout_n, cols_a, D, exact_a)
        if split:
            total_b = tl.zeros([BLOCK_B], dtype=tl.float32)
            if HAS_DOUT:
                total_b = _row(dout_ptr, b * dout_b + n * dout_n, cols_b, D, EXACT)
        if NORMED:
            mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
            # Columns that do not exist have dy = 0: what `normed` is there does not matter.
            normed_a = (_row(x_ptr, b * x_b + n * x_n, cols_a, D, exact_a) - mean) * rstd
            dy_a = _row(dy_ptr, b * dy_b + n * dy_n, cols_a, D, exact_a)
            d_a = dy_a * factor_a
            average = tl.sum(d_a, axis=0)
            slope = tl.sum(d_a * normed_a, axis=0)
            dshift_a += dy_a
            dscale_a += dy_a * normed_a
            if split:
                normed_b = (_row(x_ptr, b * x_b + n * x_n, cols_b, D, EXACT) - mean) * rstd
                dy_r = _row(dy_ptr, b * dy_b + n * dy_n, cols_b, D, EXACT)
                d_b = dy_r * factor_b
                average += tl.sum(d_b, axis=0)
                slope += tl.sum(d_b * normed_b, axis=0)
                dshift_b += dy_r
                dscale_b += dy_r * normed_b
            average = average / D
            slope = slope / D
            if RMS:
                average = 0.0
            total_a += rstd * (d_a - average - normed_a * slope)
            _save(dx_ptr, row * D, total_a, cols_a, D, exact_a)
            if split:
                total_b += rstd * (d_b - average - normed_b * slope)
                _save(dx_ptr, row * D, total_b, cols_b, D, EXACT)
        if GATED:
            _save(dh_ptr, row * D, gate_a * total_a, cols_a, D, exact_a)
            dgate_a += total_a * _row(h_ptr, b * h_b + n * h_n, cols_a, D, exact_a)
            if split:
                _save(dh_ptr, row * D, gate_b_ * total_b, cols_b, D, EXACT)
                dgate_b += total_b * _row(h_ptr, b * h_b + n * h_n, cols_b, D, EXACT)
        if BIAS:
            sum_a += total_a
            if split:
                sum_b += total_b
    at = program * 4 * D
    if GATED:
        _save(partial_ptr, at, dgate_a, cols_a, D, exact_a)
    if NORMED:
        _save(partial_ptr, at + D, dshift_a, cols_a, D, exact_a)
        _save(partial_ptr, at + 2 * D, dscale_a, cols_a, D, exact_a)
    if BIAS:
        _save(partial_ptr, at + 3 * D, sum_a, cols_a, D, exact_a)
    if split:
        if GATED:
            _save(partial_ptr, at, dgate_b, cols_b, D, EXACT)
        if NORMED:
            _save(partial_ptr, at + D, dshift_b, cols_b, D, EXACT)
            _save(partial_ptr, at + 2 * D, dscale_b, cols_b, D, EXACT)
        if BIAS:
            _save(partial_ptr, at + 3 * D, sum_b, cols_b, D, EXACT)


@triton.jit
def reduce_kernel(
    partial_ptr, gate_ptr, bias_ptr, dmod_ptr, D, chunks, gate_b,
    GATED: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second stage: the chunks of sample b and BLOCK columns, in order, into dmod[b].

    With a bias, the sample's sum of dx becomes the bias's part of dgate, and gate times it, the
    sample's part of dbias, takes the place of its first chunk for `bias_kernel`.
    """
    b = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    dgate = tl.zeros([BLOCK], dtype=tl.float32)
    dshift = tl.zeros([BLOCK], dtype=tl.float32)
    dscale = tl.zeros([BLOCK], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for c in range(0, chunks):
        at = partial_ptr + (b * chunks + c) * 4 * D + cols
        if GATED:
            dgate += tl.load(at, mask=mask, other=0.0)
        if NORMED:
            dshift += tl.load(at + D, mask=mask, other=0.0)
            dscale += tl.load(at + 2 * D, mask=mask, other=0.0)
        if BIAS:
            total += tl.load(at + 3 * D, mask=mask, other=0.0)
    if BIAS:
        gate = tl.load(gate_ptr + b * gate_b + cols, mask=mask, other=0.0).to(tl.float32)
        dgate += total * tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial_ptr + b * chunks * 4 * D + 3 * D + cols, gate * total, mask=mask)
    vectors: tl.constexpr = GATED + 2 * NORMED
    at = dmod_ptr + b * vectors * D + cols
    if GATED:
        tl.store(at, dgate.to(dmod_ptr.dtype.element_ty), mask=mask)
    if NORMED:
        at += GATED * D
        tl.store(at, dshift.to(dmod_ptr.dtype.element_ty), mask=mask)
        tl.store(at + D, dscale.to(dmod_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_kernel(
    partial_ptr, dbias_ptr, B, D, chunks, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Third stage: the samples' parts of dbias, BLOCK columns, ROWS samples at a time."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in range(0, B, ROWS):
        b = (first + tl.arange(0, ROWS)).to(tl.int64)
        at = partial_ptr + (b * chunks * 4 * D + 3 * D)[:, None] + cols[None, :]
        total += tl.load(at, mask=(b < B)[:, None] & mask[None, :], other=0.0)
    dbias = tl.sum(total, axis=0).to(dbias_ptr.dtype.element_ty)
    tl.store(dbias_ptr + cols, dbias, mask=mask)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def config_of(x: Tensor) -> LaunchConfig:
    return LaunchConfig.for_shape(*(int(size) for size in x.shape), _multiprocessors(x.device))


def _launch_forward(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(out, y, mean, rstd); None for what the operator does not have."""
    made = new_outputs(x, gate, scale, out_dtype)
    B, N, D = x.shape
    if x.numel():
        config = config_of(x)
        tiles = triton.cdiv(N, config.tile)
        # Absent tensors are passed as x; the constexpr flags keep the kernel away from them.
        x_, h_, *vectors = (x if t is None else dense(t) for t in (x, h, gate, shift, scale, bias))
        outputs = (x if t is None else t for t in made)
        wrap_triton(adaln_fwd_kernel)[(B * tiles,)](
            x_, h_, *vectors, *outputs,
            N, D, x_.stride(0), x_.stride(1), h_.stride(0), h_.stride(1),
            *(t.stride(0) for t in vectors[:3]), tiles, eps,
            GATED=gate is not None, NORMED=scale is not None, BIAS=bias is not None, RMS=rms,
            TILE=config.tile, BLOCK_A=config.block_a, BLOCK_B=config.block_b, EXACT=config.exact,
            num_warps=config.warps,
        )  # fmt: skip
    elif scale is not None:
        made[2].zero_(), made[3].zero_()
    if backends.verifying():
        verify_forward(made[:2], x, h, gate, shift, scale, bias, eps, rms, out_dtype)
    return made


def _launch_backward(
    op: str,
    dout: Tensor | None,
    dy: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor | None, ...]:
    """(dx, dh, dmodulation, dbias); None for what does not apply."""
    made = dx, dh, dmod, dbias = new_gradients(x, h, gate, scale, bias)
    gated, normed, biased = gate is not None, scale is not None, bias is not None
    lead = x if x is not None else h
    if lead.numel() == 0:
        return tuple(None if t is None else t.zero_() for t in made)
    B, N, D = lead.shape
    config = config_of(lead)
    chunks = triton.cdiv(N, config.rows)
    partial = lead.new_empty((B, chunks, 4, D), dtype=torch.float32)
    # Absent tensors are passed as `lead`; the constexpr flags keep the kernels away from them.
    given = [lead if t is None else dense(t) for t in (dout, dy, x, h, gate, scale)]
    wide = [s for t in given[:4] for s in (t.stride(0), t.stride(1))]
    saved = (mean, rstd) if normed else (lead, lead)
    flags = {"GATED": gated, "NORMED": normed, "BIAS": biased}
    wrap_triton(adaln_bwd_kernel)[(B * chunks,)](
        *given, *saved, dx if normed else lead, dh if gated else lead, partial,
        N, D, *wide, given[4].stride(0), given[5].stride(0), chunks, config.rows,
        HAS_DOUT=dout is not None, RMS=rms, BLOCK_A=config.block_a, BLOCK_B=config.block_b,
        EXACT=config.exact, STAGES=config.stages, **flags, num_warps=config.backward_warps,
    )  # fmt: skip
    block = min(256, triton.next_power_of_2(D))
    wrap_triton(reduce_kernel)[(B, triton.cdiv(D, block))](
        partial, given[4], dense(bias) if biased else lead, dmod, D, chunks, given[4].stride(0),
        **flags, BLOCK=block, num_warps=4,
    )  # fmt: skip
    if biased:
        # Few columns a program: more programs, each with 16 samples' loads in flight.
        wrap_triton(bias_kernel)[(triton.cdiv(D, 32),)](
            partial, dbias, B, D, chunks, ROWS=16, BLOCK=32, num_warps=4
        )
    if backends.verifying():
        verify_backward(op, made, dout, dy, x, h, gate, scale, bias, eps, rms)
    return made


for _name, _implementation in implementations(_launch_forward, _launch_backward).items():
    triton_op(f"etude::triton_{_name}", backends.on_its_device(_implementation), mutates_args={})
register_gradients("triton_")


def builds() -> list[Build]:
    """Launches of the DiT family in bfloat16, 256 images of 256 tokens, for `compiling`."""
    made = []
    wide = ("mean_ptr", "rstd_ptr", "partial_ptr")
    unaligned = ("eps", "chunks", "tiles", "rows", "B")
    both = {"GATED": True, "NORMED": True, "RMS": False}
    modulate = {"GATED": False, "NORMED": True}
    for D in (144, 384, 768, 1152, 4096):
        c = LaunchConfig.for_shape(256, 256, D)
        pieces = {"BLOCK_A": c.block_a, "BLOCK_B": c.block_b, "EXACT": c.exact}
        forward = pieces | {"TILE": c.tile}
        backward = pieces | {"STAGES": c.stages, "HAS_DOUT": True}
        listed = [
            ("forward", adaln_fwd_kernel, forward | both | {"BIAS": False}, c.warps),
            ("backward", adaln_bwd_kernel, backward | both | {"BIAS": False}, c.backward_warps),
        ]
        if D == 1152:
            flags = {"BIAS": True}
            plain = {**modulate, "BIAS": False, "RMS": True}
            alone = {**modulate, "BIAS": False, "RMS": False, "HAS_DOUT": False}
            listed += [
                ("forward bias", adaln_fwd_kernel, forward | both | flags, c.warps),
                ("forward rmsnorm", adaln_fwd_kernel, forward | plain, c.warps),
                ("backward bias", adaln_bwd_kernel, backward | both | flags, c.backward_warps),
                ("backward norm", adaln_bwd_kernel, backward | alone, c.backward_warps),
                (
                    "reduce",
                    reduce_kernel,
                    {"GATED": True, "NORMED": True, **flags, "BLOCK": 256},
                    4,
                ),
                ("reduce bias", bias_kernel, {"ROWS": 16, "BLOCK": 32}, 4),
            ]
        for name, kernel, constants, warps in listed:
            free = [n for n in kernel.arg_names if n not in constants]
            types = {n: "fp32" if n == "eps" else "i32" for n in free}
            types |= {n: "*fp32" if n in wide else "*bf16" for n in free if n.endswith("_ptr")}
            aligned = tuple(n for n in free if not n.endswith("_ptr") and n not in unaligned)
            made.append(Build(f"{name} D={D}", kernel, types, constants, aligned, warps))
    return made
