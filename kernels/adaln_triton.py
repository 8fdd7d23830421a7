"""Triton twins of `adaln.py`: the same operators for CUDA tensors, registered on first use.

One program of the forward kernel takes one row; one program of the backward kernel takes a run of
`rows` rows of one picture, keeps the sums of dgate, dshift and dscale in registers and writes them
to partial[b, chunk, 3, D] (float32); a second kernel adds the chunks in order. No atomics: the sums
have the same bits in every run. Addresses are int64, arithmetic is float32, D is masked.

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
from .adaln import backward_reference, forward_reference, register_gradients
from .compiling import Build


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is launched for rows of D elements."""

    block: int  # columns of a program: the power of two at or above D
    warps: int  # of the forward kernel
    backward_warps: int  # more: it keeps three sums per column in registers
    rows: int  # rows per program of the backward kernel

    @classmethod
    def for_width(cls, D: int, N: int) -> "LaunchConfig":
        """A heuristic, not a measurement: 16 bytes per thread and load, at most 16 warps."""
        block = max(16, triton.next_power_of_2(D))
        warps = min(16, max(1, block // 512))
        more = min(16, max(1, block // 256))
        return cls(block, warps, more, rows=max(1, min(64, N)))


@triton.jit
def adaln_fwd_kernel(
    x_ptr, h_ptr, gate_ptr, shift_ptr, scale_ptr, out_ptr, y_ptr, mean_ptr, rstd_ptr,
    N, D, x_b, x_n, h_b, h_n, gate_b, shift_b, scale_b, eps,
    GATED: tl.constexpr, NORMED: tl.constexpr, RMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row (b, n): out = x + gate * h where GATED, y = modulated norm where NORMED."""
    row = tl.program_id(0).to(tl.int64)
    b = row // N
    n = row % N
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    x = tl.load(x_ptr + b * x_b + n * x_n + cols, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        h = tl.load(h_ptr + b * h_b + n * h_n + cols, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + b * gate_b + cols, mask=mask, other=0.0).to(tl.float32)
        # Rounded as it is stored, so that backward normalises the same values.
        out = (x + gate * h).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * D + cols, out, mask=mask)
        x = out.to(tl.float32)
    if NORMED:
        if RMS:
            mean = 0.0
        else:
            mean = tl.sum(x, axis=0) / D
        centred = tl.where(mask, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
        shift = tl.load(shift_ptr + b * shift_b + cols, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + b * scale_b + cols, mask=mask, other=0.0).to(tl.float32)
        y = centred * rstd * (1.0 + scale) + shift
        tl.store(y_ptr + row * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit
def adaln_bwd_kernel(
    dout_ptr, dy_ptr, x_ptr, h_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dh_ptr, partial_ptr,
    N, D, dout_b, dout_n, dy_b, dy_n, x_b, x_n, h_b, h_n, gate_b, scale_b, chunks,
    GATED: tl.constexpr, NORMED: tl.constexpr, HAS_DOUT: tl.constexpr, RMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of picture b: dx, dh, and this chunk's sums of dgate, dshift and dscale."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    first = (program % chunks) * ROWS
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    dgate = tl.zeros([BLOCK], dtype=tl.float32)
    dshift = tl.zeros([BLOCK], dtype=tl.float32)
    dscale = tl.zeros([BLOCK], dtype=tl.float32)
    if NORMED:
        scale = tl.load(scale_ptr + b * scale_b + cols, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + b * gate_b + cols, mask=mask, other=0.0).to(tl.float32)
    for i in range(0, ROWS):
        n = first + i
        live = mask & (n < N)
        row = b * N + n
        total = tl.zeros([BLOCK], dtype=tl.float32)
        if HAS_DOUT:
            total = tl.load(dout_ptr + b * dout_b + n * dout_n + cols, mask=live, other=0.0)
            total = total.to(tl.float32)
        if NORMED:
            x = tl.load(x_ptr + b * x_b + n * x_n + cols, mask=live, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + b * dy_b + n * dy_n + cols, mask=live, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + row, mask=n < N, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=n < N, other=0.0)
            normed = tl.where(live, (x - mean) * rstd, 0.0)
            d = dy * (1.0 + scale)
            average = 0.0
            if not RMS:
                average = tl.sum(d, axis=0) / D
            slope = tl.sum(d * normed, axis=0) / D
            total += rstd * (d - average - normed * slope)
            dshift += dy
            dscale += dy * normed
            tl.store(dx_ptr + row * D + cols, total.to(dx_ptr.dtype.element_ty), mask=live)
        if GATED:
            h = tl.load(h_ptr + b * h_b + n * h_n + cols, mask=live, other=0.0).to(tl.float32)
            dh = gate * total
            tl.store(dh_ptr + row * D + cols, dh.to(dh_ptr.dtype.element_ty), mask=live)
            dgate += tl.where(live, total * h, 0.0)
    at = partial_ptr + program * 3 * D + cols
    tl.store(at, dgate, mask=mask)
    tl.store(at + D, dshift, mask=mask)
    tl.store(at + 2 * D, dscale, mask=mask)


@triton.jit
def reduce_kernel(
    partial_ptr, dgate_ptr, dshift_ptr, dscale_ptr, D, chunks,
    GATED: tl.constexpr, NORMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second stage: the chunks of one picture and BLOCK columns, added in order."""
    b = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    dgate = tl.zeros([BLOCK], dtype=tl.float32)
    dshift = tl.zeros([BLOCK], dtype=tl.float32)
    dscale = tl.zeros([BLOCK], dtype=tl.float32)
    for c in range(0, chunks):
        at = partial_ptr + (b * chunks + c) * 3 * D + cols
        if GATED:
            dgate += tl.load(at, mask=mask, other=0.0)
        if NORMED:
            dshift += tl.load(at + D, mask=mask, other=0.0)
            dscale += tl.load(at + 2 * D, mask=mask, other=0.0)
    if GATED:
        tl.store(dgate_ptr + b * D + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    if NORMED:
        tl.store(dshift_ptr + b * D + cols, dshift.to(dshift_ptr.dtype.element_ty), mask=mask)
        tl.store(dscale_ptr + b * D + cols, dscale.to(dscale_ptr.dtype.element_ty), mask=mask)


def _verifying() -> bool:
    """Values are compared in eager calls only: under torch.compile there are none to look at."""
    return backends.verifying() and not torch.compiler.is_compiling()


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _launch_forward(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, y, mean, rstd); what the operator lacks is an alias that the kernel does not touch."""
    B, N, D = x.shape
    x = _dense(x)
    gated, normed = gate is not None, scale is not None
    h, gate = (_dense(h), _dense(gate)) if gated else (x, x)
    shift, scale = (_dense(shift), _dense(scale)) if normed else (x, x)
    out = x.new_empty(x.shape) if gated else x
    y = x.new_empty(x.shape, dtype=out_dtype or x.dtype) if normed else x
    mean = x.new_zeros((B, N), dtype=torch.float32)
    rstd = x.new_zeros((B, N), dtype=torch.float32)
    if x.numel():
        config = LaunchConfig.for_width(D, N)
        wrap_triton(adaln_fwd_kernel)[(B * N,)](
            x, h, gate, shift, scale, out, y, mean, rstd,
            N, D, x.stride(0), x.stride(1), h.stride(0), h.stride(1) if gated else 0,
            gate.stride(0), shift.stride(0), scale.stride(0), eps,
            GATED=gated, NORMED=normed, RMS=rms, BLOCK=config.block, num_warps=config.warps,
        )  # fmt: skip
    if _verifying():
        want = forward_reference(x, h, gate, shift, scale, eps, rms, out_dtype, gated, normed)
        backends.verify("triton forward", ("out", "y"), (out, y), want)
    return out, y, mean, rstd


def _launch_backward(
    dout: Tensor | None,
    dy: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    rms: bool,
) -> list[Tensor | None]:
    """[dx, dh, dgate, dshift, dscale]; None for what does not apply."""
    gated, normed, lead = gate is not None, scale is not None, x if x is not None else h
    B, N, D = lead.shape
    dx = lead.new_zeros(lead.shape) if normed else None
    dh = h.new_zeros(h.shape) if gated else None
    dgate = gate.new_zeros(gate.shape) if gated else None
    dshift = scale.new_zeros(scale.shape) if normed else None
    dscale = scale.new_zeros(scale.shape) if normed else None
    made = [dx, dh, dgate, dshift, dscale]
    if lead.numel() == 0:
        return made
    config = LaunchConfig.for_width(D, N)
    chunks = triton.cdiv(N, config.rows)
    partial = lead.new_empty((B, chunks, 3, D), dtype=torch.float32)
    # Absent tensors are passed as `lead`; the constexpr flags keep the kernel away from them.
    given = [lead if t is None else _dense(t) for t in (dout, dy, x, h, gate, scale)]
    wide = [s for t in given[:4] for s in (t.stride(0), t.stride(1))]
    outputs = [lead if t is None else t for t in made]
    wrap_triton(adaln_bwd_kernel)[(B * chunks,)](
        *given, mean if normed else lead, rstd if normed else lead, outputs[0], outputs[1], partial,
        N, D, *wide, given[4].stride(0), given[5].stride(0), chunks,
        GATED=gated, NORMED=normed, HAS_DOUT=dout is not None, RMS=rms, ROWS=config.rows,
        BLOCK=config.block, num_warps=config.backward_warps,
    )  # fmt: skip
    block = min(256, config.block)
    wrap_triton(reduce_kernel)[(B, triton.cdiv(D, block))](
        partial, *outputs[2:], D, chunks, GATED=gated, NORMED=normed, BLOCK=block, num_warps=4
    )
    if _verifying():
        want = backward_reference(dout, dy, x, h, gate, scale, eps, rms)
        backends.verify_gradients("triton backward", made, want)
    return made


@triton_op("etude::triton_adaln_modulate", mutates_args={})
def _modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, rms: bool, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_forward(x, None, None, shift, scale, eps, rms, out_dtype)[1:]


@triton_op("etude::triton_gate_residual", mutates_args={})
def _gate_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    return _launch_forward(x, h, gate, None, None, 0.0, False, None)[0]


@triton_op("etude::triton_gate_residual_adaln", mutates_args={})
def _gate_residual_adaln(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch_forward(x, h, gate, shift, scale, eps, rms, out_dtype)


@triton_op("etude::triton_adaln_modulate_backward", mutates_args={})
def _modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _launch_backward(None, dy, x, None, None, scale, mean, rstd, eps, rms)
    return grads[0], grads[3], grads[4]


@triton_op("etude::triton_gate_residual_backward", mutates_args={})
def _gate_residual_backward(dout: Tensor, h: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    grads = _launch_backward(dout, None, None, h, gate, None, None, None, 0.0, False)
    return grads[1], grads[2]


@triton_op("etude::triton_gate_residual_adaln_backward", mutates_args={})
def _gate_residual_adaln_backward(
    dout: Tensor,
    dy: Tensor,
    out: Tensor,
    h: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(_launch_backward(dout, dy, out, h, gate, scale, mean, rstd, eps, rms))


register_gradients("triton_")


def builds() -> list[Build]:
    """The launches of DiT-XL/2 in bfloat16, for `compiling`."""
    width, config = 1152, LaunchConfig.for_width(1152, 256)
    both = {"GATED": True, "NORMED": True, "RMS": False}
    wide = ("mean_ptr", "rstd_ptr", "partial_ptr")
    unaligned = ("N", "eps", "chunks")
    listed = (
        ("forward", adaln_fwd_kernel, both | {"BLOCK": config.block}, config.warps),
        (
            "forward rmsnorm",
            adaln_fwd_kernel,
            {"GATED": False, "NORMED": True, "RMS": True, "BLOCK": config.block},
            config.warps,
        ),
        (
            "backward",
            adaln_bwd_kernel,
            both | {"HAS_DOUT": True, "ROWS": config.rows, "BLOCK": config.block},
            config.backward_warps,
        ),
        ("reduce", reduce_kernel, {"GATED": True, "NORMED": True, "BLOCK": 256}, 4),
    )
    made = []
    for name, kernel, constants, warps in listed:
        free = [n for n in kernel.arg_names if n not in constants]
        types = {n: "fp32" if n == "eps" else "i32" for n in free}
        types |= {n: "*fp32" if n in wide else "*bf16" for n in free if n.endswith("_ptr")}
        aligned = tuple(n for n in free if not n.endswith("_ptr") and n not in unaligned)
        made.append(Build(f"{name} D={width}", kernel, types, constants, aligned, warps))
    return made
