"""Adaptive LayerNorm and gated residuals of a diffusion transformer block.

Called by the models' blocks. For x, h: (B, N, D) and shift, scale, gate: (B, D)

    normed = (x - mean(x)) * rstd          LayerNorm; RMSNorm: x * rstd with rstd of the raw x
    adaln_modulate:       y = normed * (1 + scale) + shift
    gate_residual:        out = x + gate * h
    gate_residual_adaln:  out = x + gate * h;  y = adaln_modulate(out, shift, scale)

(adaLN-Zero of Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023; no learned
affine inside the norm). Backward, with d = dy * (1 + scale), in one pass over the rows:

    dx = rstd * (d - mean(d) - normed * mean(d * normed))      RMSNorm: without mean(d)
    dshift = sum_n dy;  dscale = sum_n dy * normed
    with a gate, t = dout + dx:  dx = t;  dh = gate * t;  dgate = sum_n t * h

All arithmetic is in float32 (float64 for float64 inputs); sums over rows are taken in two fixed
stages, so they have the same bits for any number of threads. y has the dtype of x, or under
autocast the autocast dtype (what the next matmul takes); out always has the dtype of x.
"""

import torch
from torch import Tensor

from . import backends
from .catalogue import Operator

_NORMS = ("layernorm", "rmsnorm")
_ABSENT = (0, 0, 0, 0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _normed(x: Tensor, eps: float, rms: bool) -> Tensor:
    """x (..., D), already float32 or float64, with zero mean (unless rms) and unit variance."""
    if not rms:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def adaln_modulate_reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    norm: str = "layernorm",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`adaln_modulate` in plain torch, differentiated by autograd."""
    wide = _wide(x)
    y = _normed(x.to(wide), eps, norm == "rmsnorm")
    y = y * (1 + scale.to(wide).unsqueeze(1)) + shift.to(wide).unsqueeze(1)
    return y.to(out_dtype or x.dtype)


def gate_residual_reference(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """`gate_residual` in plain torch, differentiated by autograd."""
    wide = _wide(x)
    return (x.to(wide) + gate.to(wide).unsqueeze(1) * h.to(wide)).to(x.dtype)


def gate_residual_adaln_reference(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    norm: str = "layernorm",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`gate_residual_adaln` in plain torch: the two operators one after the other."""
    out = gate_residual_reference(x, h, gate)
    y = adaln_modulate_reference(out, shift, scale, eps=eps, norm=norm, out_dtype=out_dtype)
    return out, y


def forward_reference(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype | None,
    gated: bool,
    normed: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(out, y) of the operator that has a gate, a norm or both, for `ETUDE_VERIFY`."""
    out = gate_residual_reference(x, h, gate) if gated else None
    y = None
    if normed:
        x = x if out is None else out
        y = adaln_modulate_reference(
            x, shift, scale, eps=eps, norm=_NORMS[rms], out_dtype=out_dtype
        )
    return out, y


def backward_reference(
    dout: Tensor | None,
    dy: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor | None, ...]:
    """(dx, dh, dgate, dshift, dscale) by the equations above, in float32, for `ETUDE_VERIFY`.

    x is the normed tensor (`out` where there is a gate). What does not apply is None.
    """
    total = dout.float() if dout is not None else 0.0
    dh = dgate = dshift = dscale = None
    if dy is not None:
        centred = x.float() if rms else x.float() - x.float().mean(-1, keepdim=True)
        rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        normed = centred * rstd
        d = dy.float() * (1 + scale.float().unsqueeze(1))
        average = 0.0 if rms else d.mean(-1, keepdim=True)
        total = total + rstd * (d - average - normed * (d * normed).mean(-1, keepdim=True))
        dshift, dscale = dy.float().sum(1), (dy.float() * normed).sum(1)
    if gate is not None:
        dh = gate.float().unsqueeze(1) * total
        dgate = (total * h.float()).sum(1)
    return total, dh, dgate, dshift, dscale


# The C++ twin as torch operators. A mean and a reciprocal deviation per row are kept for backward.
_library = torch.library.Library("etude", "FRAGMENT")
_NORM = "float eps, bool rms"
_SCHEMAS = {
    "adaln_modulate": f"(Tensor x, Tensor shift, Tensor scale, {_NORM}, ScalarType? out_dtype) "
    "-> (Tensor, Tensor, Tensor)",
    "gate_residual": "(Tensor x, Tensor h, Tensor gate) -> Tensor",
    "gate_residual_adaln": "(Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, "
    f"{_NORM}, ScalarType? out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    "adaln_modulate_backward": "(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd, "
    f"{_NORM}) -> (Tensor, Tensor, Tensor)",
    "gate_residual_backward": "(Tensor dout, Tensor h, Tensor gate) -> (Tensor, Tensor)",
    "gate_residual_adaln_backward": "(Tensor dout, Tensor dy, Tensor out, Tensor h, Tensor gate, "
    f"Tensor scale, Tensor mean, Tensor rstd, {_NORM}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
ops = torch.ops.etude


def _rows(t: Tensor | None) -> tuple[int, int, int, int]:
    """A tensor as the C++ side takes it; its last dimension must be contiguous."""
    if t is None:
        return _ABSENT
    kind = backends.cpp().BFLOAT16 if t.dtype == torch.bfloat16 else backends.cpp().FLOAT32
    return t.data_ptr(), kind, t.stride(0), t.stride(1) if t.dim() == 3 else 0


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous, uninitialised tensor of t's shape (empty_like would keep t's strides)."""
    return t.new_empty(t.shape, dtype=dtype or t.dtype)


def _row_values(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def _forward_cpu(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(out, y, mean, rstd) of the C++ kernel; None for what the operator does not have."""
    inputs = [None if t is None else _dense(t) for t in (x, h, gate, shift, scale)]
    out = None if gate is None else _like(x)
    y, mean, rstd = None, None, None
    if scale is not None:
        y, mean, rstd = _like(x, out_dtype), _row_values(x), _row_values(x)
    if x.numel():
        backends.cpp().adaln_forward(
            tuple(x.shape),
            *(_rows(t) for t in (*inputs, out, y)),
            0 if mean is None else mean.data_ptr(),
            0 if rstd is None else rstd.data_ptr(),
            eps,
            rms,
            torch.get_num_threads(),
        )
    elif mean is not None:
        mean.zero_(), rstd.zero_()
    if backends.verifying():
        gated, normed = gate is not None, scale is not None
        want = forward_reference(x, h, gate, shift, scale, eps, rms, out_dtype, gated, normed)
        backends.verify("C++ forward", ("out", "y"), (out, y), want)
    return out, y, mean, rstd


def _backward_cpu(
    op: str,
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
) -> tuple[Tensor | None, ...]:
    """(dx, dh, dgate, dshift, dscale) of the C++ kernel; None for what does not apply."""
    given = [None if t is None else _dense(t) for t in (dout, dy, x, h, gate, scale)]
    lead = x if x is not None else h
    dx = None if dy is None else _like(x)
    dh, dgate = (None, None) if gate is None else (_like(h), _like(gate))
    dshift, dscale = (None, None) if dy is None else (_like(scale), _like(scale))
    made = (dx, dh, dgate, dshift, dscale)
    if lead.numel() == 0:
        return tuple(None if t is None else t.zero_() for t in made)
    B, N, D = lead.shape
    chunks = -(-N // backends.cpp().ROWS_PER_CHUNK)
    partial = lead.new_empty((B, chunks, 3, D), dtype=torch.float32)
    backends.cpp().adaln_backward(
        (B, N, D),
        *(_rows(t) for t in given),
        0 if mean is None else mean.data_ptr(),
        0 if rstd is None else rstd.data_ptr(),
        *(_rows(t) for t in made),
        partial.data_ptr(),
        rms,
        torch.get_num_threads(),
    )
    if backends.verifying():
        want = backward_reference(dout, dy, x, h, gate, scale, eps, rms)
        backends.verify_gradients(op, made, want)
    return made


def _adaln_modulate_cpu(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, rms: bool, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_cpu(x, None, None, shift, scale, eps, rms, out_dtype)[1:]


def _gate_residual_cpu(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    return _forward_cpu(x, h, gate, None, None, 0.0, False, None)[0]


def _adaln_modulate_backward_cpu(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    name = "adaln_modulate_backward"
    grads = _backward_cpu(name, None, dy, x, None, None, scale, mean, rstd, eps, rms)
    return grads[0], grads[3], grads[4]


def _gate_residual_backward_cpu(dout: Tensor, h: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    name = "gate_residual_backward"
    return _backward_cpu(name, dout, None, None, h, gate, None, None, None, 0.0, False)[1:3]


def _gate_residual_adaln_backward_cpu(
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
) -> tuple[Tensor, ...]:
    name = "gate_residual_adaln_backward"
    return _backward_cpu(name, dout, dy, out, h, gate, scale, mean, rstd, eps, rms)


for _name, _kernel in {
    "adaln_modulate": _adaln_modulate_cpu,
    "gate_residual": _gate_residual_cpu,
    "gate_residual_adaln": _forward_cpu,
    "adaln_modulate_backward": _adaln_modulate_backward_cpu,
    "gate_residual_backward": _gate_residual_backward_cpu,
    "gate_residual_adaln_backward": _gate_residual_adaln_backward_cpu,
}.items():
    _library.impl(_name, _kernel, "CPU")


@torch.library.register_fake("etude::adaln_modulate", lib=_library)
def _(x, shift, scale, eps, rms, out_dtype):
    return _like(x, out_dtype), _row_values(x), _row_values(x)


@torch.library.register_fake("etude::gate_residual", lib=_library)
def _(x, h, gate):
    return _like(x)


@torch.library.register_fake("etude::gate_residual_adaln", lib=_library)
def _(x, h, gate, shift, scale, eps, rms, out_dtype):
    return _like(x), _like(x, out_dtype), _row_values(x), _row_values(x)


@torch.library.register_fake("etude::adaln_modulate_backward", lib=_library)
def _(dy, x, scale, mean, rstd, eps, rms):
    return _like(x), _like(scale), _like(scale)


@torch.library.register_fake("etude::gate_residual_backward", lib=_library)
def _(dout, h, gate):
    return _like(h), _like(gate)


@torch.library.register_fake("etude::gate_residual_adaln_backward", lib=_library)
def _(dout, dy, out, h, gate, scale, mean, rstd, eps, rms):
    return _like(out), _like(h), _like(gate), _like(scale), _like(scale)


def register_gradients(prefix: str) -> None:
    """Give the three operators named `etude::<prefix>...` their backward operators.

    Called here for the C++ operators and by `adaln_triton` for the Triton ones.
    """

    def modulate_context(ctx, inputs, output) -> None:
        x, _, scale, ctx.eps, ctx.rms, _ = inputs
        ctx.save_for_backward(x, scale, output[1], output[2])

    def modulate_backward(ctx, dy, dmean, drstd):
        x, scale, mean, rstd = ctx.saved_tensors
        op = getattr(ops, f"{prefix}adaln_modulate_backward")
        return *op(dy, x, scale, mean, rstd, ctx.eps, ctx.rms), None, None, None

    def gate_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[1:])

    def gate_backward(ctx, dout):
        return dout, *getattr(ops, f"{prefix}gate_residual_backward")(dout, *ctx.saved_tensors)

    def both_context(ctx, inputs, output) -> None:
        _, h, gate, _, scale, ctx.eps, ctx.rms, _ = inputs
        out, _, mean, rstd = output
        ctx.save_for_backward(out, h, gate, scale, mean, rstd)

    def both_backward(ctx, dout, dy, dmean, drstd):
        op = getattr(ops, f"{prefix}gate_residual_adaln_backward")
        return *op(dout, dy, *ctx.saved_tensors, ctx.eps, ctx.rms), None, None, None

    register = torch.library.register_autograd
    register(f"etude::{prefix}adaln_modulate", modulate_backward, setup_context=modulate_context)
    register(f"etude::{prefix}gate_residual", gate_backward, setup_context=gate_context)
    register(f"etude::{prefix}gate_residual_adaln", both_backward, setup_context=both_context)


register_gradients("")


def _check(op: str, norm: str, x: Tensor, rows: dict[str, Tensor], mods: dict[str, Tensor]) -> None:
    """Shapes, dtypes and devices; ValueError with one sentence."""
    if norm not in _NORMS:
        raise ValueError(f"{op}: norm={norm!r} is unknown: use layernorm or rmsnorm")
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be (B, N, D), got {tuple(x.shape)}")
    batch_width = (x.shape[0], x.shape[2])
    for name, t in (("x", x), *rows.items(), *mods.items()):
        shape = batch_width if name in mods else x.shape
        if tuple(t.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} must be {tuple(shape)}, got {tuple(t.shape)}")
        if not t.is_floating_point() or t.device != x.device:
            raise ValueError(
                f"{op}: {name} is {t.dtype} on {t.device}; x is {x.dtype} on {x.device}"
            )
    if len({t.dtype for t in mods.values()}) != 1:
        raise ValueError(f"{op}: {', '.join(mods)} must have one dtype")


def _output_dtype(x: Tensor) -> torch.dtype | None:
    """The autocast rule: y is what the next matmul would cast it to."""
    kind = x.device.type
    known = kind in ("cpu", "cuda")  # torch raises for devices without autocast, such as meta
    if known and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _triton() -> None:
    """Register the Triton operators on first use."""
    from . import adaln_triton  # noqa: F401


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, norm: str = "layernorm"
) -> Tensor:
    """norm(x) * (1 + scale) + shift.

    x: (B, N, D); shift, scale: (B, D), any strides (`chunk` views are taken as they are); float16,
    bfloat16, float32 or float64. norm: "layernorm" or "rmsnorm". Returns (B, N, D) of x's dtype
    (under autocast, the autocast dtype). Errors: ValueError for shapes, dtypes or devices that do
    not fit together; RuntimeError for a backend asked for by name that cannot run.
    """
    _check("adaln_modulate", norm, x, {}, {"shift": shift, "scale": scale})
    to = _output_dtype(x)
    backend = backends.pick("adaln_modulate", x.device.type, x.dtype, shift.dtype, to or x.dtype)
    if backend == "reference":
        return adaln_modulate_reference(x, shift, scale, eps=eps, norm=norm, out_dtype=to)
    if backend == "triton":
        _triton()
        return ops.triton_adaln_modulate(x, shift, scale, eps, norm == "rmsnorm", to)[0]
    return ops.adaln_modulate(x, shift, scale, eps, norm == "rmsnorm", to)[0]


def gate_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate * h. x, h: (B, N, D); gate: (B, D). Returns (B, N, D) of x's dtype, always.

    Strides, dtypes and errors as in `adaln_modulate`.
    """
    _check("gate_residual", "layernorm", x, {"h": h}, {"gate": gate})
    backend = backends.pick("gate_residual", x.device.type, x.dtype, h.dtype, gate.dtype)
    if backend == "reference":
        return gate_residual_reference(x, h, gate)
    if backend == "triton":
        _triton()
        return ops.triton_gate_residual(x, h, gate)
    return ops.gate_residual(x, h, gate)


def gate_residual_adaln(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    norm: str = "layernorm",
) -> tuple[Tensor, Tensor]:
    """(out, y): out = x + gate * h and y = adaln_modulate(out, shift, scale), in one pass.

    x, h: (B, N, D); gate, shift, scale: (B, D). out has x's dtype; y has x's dtype or, under
    autocast, the autocast dtype. Strides, dtypes and errors as in `adaln_modulate`.
    """
    mods = {"gate": gate, "shift": shift, "scale": scale}
    _check("gate_residual_adaln", norm, x, {"h": h}, mods)
    to = _output_dtype(x)
    dtypes = (x.dtype, h.dtype, gate.dtype, to or x.dtype)
    backend = backends.pick("gate_residual_adaln", x.device.type, *dtypes)
    if backend == "reference":
        return gate_residual_adaln_reference(
            x, h, gate, shift, scale, eps=eps, norm=norm, out_dtype=to
        )
    rms = norm == "rmsnorm"
    if backend == "triton":
        _triton()
        return ops.triton_gate_residual_adaln(x, h, gate, shift, scale, eps, rms, to)[:2]
    return ops.gate_residual_adaln(x, h, gate, shift, scale, eps, rms, to)[:2]


_TWINS = ("cpp", "triton")
OPERATORS = (
    Operator("adaln_modulate", "LayerNorm or RMSNorm, per-sample shift and scale", _TWINS),
    Operator("gate_residual", "x + gate * h", _TWINS),
    Operator("gate_residual_adaln", "gate_residual, then adaln_modulate, in one pass", _TWINS),
)
