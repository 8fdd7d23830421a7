"""Adaptive LayerNorm and gated residuals of a diffusion transformer block.

Called by the models' blocks. For x, h: (B, N, D), shift, scale, gate: (B, D) and bias: (D,)

    normed = (x - mean(x)) * rstd          LayerNorm; RMSNorm: x * rstd with rstd of the raw x
    adaln_modulate:       y = normed * (1 + scale) + shift
    gate_residual:        out = x + gate * (h + bias)
    gate_residual_adaln:  out = x + gate * (h + bias);  y = adaln_modulate(out, shift, scale)

(adaLN-Zero of Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023; no learned
affine inside the norm). Backward, with d = dy * (1 + scale), in one pass over the rows:

    dx = rstd * (d - mean(d) - normed * mean(d * normed))      RMSNorm: without mean(d)
    dshift = sum_n dy;  dscale = sum_n dy * normed
    with a gate, t = dout + dx:  dx = t;  dh = gate * t;  dgate = sum_n t * (h + bias)
    with a bias:                 dbias = sum_b gate * sum_n t

`bias` is the bias of the projection that made h (call that one without it): its gradient is a sum
over all rows of dh, which this pass holds in registers, and a gate is constant over a sample's
rows, so that one sum of t per sample serves dbias and the bias's part of dgate.

The vectors come as tensors of their own or packed side by side in one (B, 3 D) `modulation`, in the
order gate, shift, scale (shift, scale where there is no gate), which is how they leave the linear
map of a DiT block: six chunks, of which gate_1, shift_2 and scale_2 are neighbours. The backward
pass writes their gradients side by side into one buffer, which is the gradient of `modulation`
itself: nothing is concatenated, filled or added. Split the map's output by torch.split with sizes
(D, D, 3 D, D): the gradient of a split is one concatenation. At N = 256 in bfloat16 it moves 4
bytes per element of the map's output, where a block's two sites move some 1,700: not worth a layout
of its own.

All arithmetic is in float32 (float64 for float64 inputs); sums over rows are taken in fixed stages,
so they have the same bits for any number of threads. y has the dtype of x, or under autocast the
autocast dtype (what the next matmul takes); out always has the dtype of x.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import backends
from .catalogue import Operator
from .tensors import dense, new_like, wide_dtype

NORMS = ("layernorm", "rmsnorm")
_ABSENT = (0, 0, 0, 0)
_TWINS = ("cpp", "triton", "cuda")


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
    wide = wide_dtype(x)
    y = _normed(x.to(wide), eps, norm == "rmsnorm")
    y = y * (1 + scale.to(wide).unsqueeze(1)) + shift.to(wide).unsqueeze(1)
    return y.to(out_dtype or x.dtype)


def gate_residual_reference(
    x: Tensor, h: Tensor, gate: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """`gate_residual` in plain torch, differentiated by autograd."""
    wide = wide_dtype(x)
    branch = h.to(wide) if bias is None else h.to(wide) + bias.to(wide)
    return (x.to(wide) + gate.to(wide).unsqueeze(1) * branch).to(x.dtype)


def gate_residual_adaln_reference(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layernorm",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`gate_residual_adaln` in plain torch: the two operators one after the other."""
    out = gate_residual_reference(x, h, gate, bias=bias)
    y = adaln_modulate_reference(out, shift, scale, eps=eps, norm=norm, out_dtype=out_dtype)
    return out, y


def forward_reference(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(out, y) of the operator that has a gate, a norm or both, for `ETUDE_VERIFY`."""
    out = None if gate is None else gate_residual_reference(x, h, gate, bias=bias)
    y = None
    if scale is not None:
        x = x if out is None else out
        y = adaln_modulate_reference(x, shift, scale, eps=eps, norm=NORMS[rms], out_dtype=out_dtype)
    return out, y


def backward_reference(
    dout: Tensor | None,
    dy: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor | None, ...]:
    """(dx, dh, dgate, dshift, dscale, dbias) by the equations above, for `ETUDE_VERIFY`.

    x is the normed tensor (`out` where there is a gate). What does not apply is None.
    """
    total = dout.float() if dout is not None else 0.0
    dh = dgate = dshift = dscale = dbias = None
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
        branch = h.float() if bias is None else h.float() + bias.float()
        dgate = (total * branch).sum(1)
        dbias = None if bias is None else dh.sum((0, 1))
    return total, dh, dgate, dshift, dscale, dbias


def verify_forward(made: tuple[Tensor | None, ...], *arguments: object) -> None:
    """Compare a twin's (out, y) with the reference of the same call."""
    backends.verify("adaln forward", ("out", "y"), made, forward_reference(*arguments))


def verify_backward(op: str, made: tuple[Tensor | None, ...], *arguments: object) -> None:
    """Compare a twin's (dx, dh, dmodulation, dbias) with the reference of the same call."""
    dx, dh, dmodulation, dbias = made
    want = backward_reference(*arguments)
    parts = list(dmodulation.unbind(1))
    parts = [None] * (want[2] is None) + parts + [None] * (2 * (want[3] is None))
    backends.verify_gradients(op, (dx, dh, *parts), want[:5])
    backends.verify(op, ("dbias",), (dbias if want[5] is not None else None,), want[5:])


# The operators of a twin (C++ here, Triton and CUDA in files of their own). Forward keeps a mean
# and a reciprocal deviation per row. The gradients of gate, shift and scale are one (B, 1 to 3, D)
# tensor; the gradient of an absent bias is empty. `_packed` takes one tensor for all vectors.
_library = torch.library.Library("etude", "FRAGMENT")
ops = torch.ops.etude
_Dtype = torch.dtype | None
_Three, _Four = tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]


def implementations(forward: Callable, backward: Callable) -> dict[str, Callable]:
    """The operators' functions by name, from a twin's two launches; annotated as their schemas.

    forward(x, h, gate, shift, scale, bias, eps, rms, out_dtype) -> (out, y, mean, rstd) and
    backward(op, dout, dy, x, h, gate, scale, bias, mean, rstd, eps, rms) -> (dx, dh, dmodulation,
    dbias), both with None for what the operator does not have.
    """

    def adaln_modulate(
        x: Tensor, shift: Tensor, scale: Tensor, eps: float, rms: bool, out_dtype: _Dtype
    ) -> _Three:
        return forward(x, None, None, shift, scale, None, eps, rms, out_dtype)[1:]

    def adaln_modulate_packed(
        x: Tensor, modulation: Tensor, eps: float, rms: bool, out_dtype: _Dtype
    ) -> _Three:
        return adaln_modulate(x, *modulation.chunk(2, 1), eps, rms, out_dtype)

    def gate_residual(x: Tensor, h: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
        return forward(x, h, gate, None, None, bias, 0.0, False, None)[0]

    def gate_residual_adaln(
        x: Tensor,
        h: Tensor,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        eps: float,
        rms: bool,
        out_dtype: _Dtype,
    ) -> _Four:
        return forward(x, h, gate, shift, scale, bias, eps, rms, out_dtype)

    def gate_residual_adaln_packed(
        x: Tensor,
        h: Tensor,
        modulation: Tensor,
        bias: Tensor | None,
        eps: float,
        rms: bool,
        out_dtype: _Dtype,
    ) -> _Four:
        return forward(x, h, *modulation.chunk(3, 1), bias, eps, rms, out_dtype)

    def adaln_modulate_backward(
        dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, eps: float, rms: bool
    ) -> tuple[Tensor, Tensor]:
        op = "adaln_modulate_backward"
        grads = backward(op, None, dy, x, None, None, scale, None, mean, rstd, eps, rms)
        return grads[0], grads[2]

    def gate_residual_backward(
        dout: Tensor, h: Tensor, gate: Tensor, bias: Tensor | None
    ) -> _Three:
        op = "gate_residual_backward"
        return backward(op, dout, None, None, h, gate, None, bias, None, None, 0.0, False)[1:]

    def gate_residual_adaln_backward(
        dout: Tensor | None,
        dy: Tensor,
        out: Tensor,
        h: Tensor,
        gate: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        eps: float,
        rms: bool,
    ) -> _Four:
        op = "gate_residual_adaln_backward"
        return backward(op, dout, dy, out, h, gate, scale, bias, mean, rstd, eps, rms)

    forwards = (adaln_modulate, adaln_modulate_packed, gate_residual, gate_residual_adaln)
    backwards = (adaln_modulate_backward, gate_residual_backward, gate_residual_adaln_backward)
    made = (*forwards, gate_residual_adaln_packed, *backwards)
    return {function.__name__: function for function in made}


def new_outputs(
    x: Tensor, gate: Tensor | None, scale: Tensor | None, out_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Uninitialised (out, y, mean, rstd) of a forward launch; None for what it does not have."""
    out = None if gate is None else new_like(x)
    if scale is None:
        return out, None, None, None
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return out, new_like(x, out_dtype), mean, rstd


def new_gradients(
    x: Tensor | None,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Uninitialised (dx, dh, dmodulation, dbias) of a backward launch; without a norm no dx."""
    dx = None if scale is None else new_like(x)
    dh = dbias = None
    vector, count = (scale if gate is None else gate), 2 * (scale is not None) + (gate is not None)
    if gate is not None:
        dh, dbias = new_like(h), gate.new_empty((0,)) if bias is None else new_like(bias)
    B, D = vector.shape
    return dx, dh, vector.new_empty((B, count, D)), dbias


def _fake_forward(x, h, gate, shift, scale, bias, eps, rms, out_dtype):
    return new_outputs(x, gate, scale, out_dtype)


def _fake_backward(op, dout, dy, x, h, gate, scale, bias, mean, rstd, eps, rms):
    return new_gradients(x, h, gate, scale, bias)


def register_gradients(prefix: str) -> None:
    """Give the operators named `etude::<prefix>...` their backward operators."""

    def modulate_context(ctx, inputs, output) -> None:
        packed = len(inputs) == 5
        x, scale = inputs[0], inputs[1].chunk(2, 1)[1] if packed else inputs[2]
        ctx.eps, ctx.rms, ctx.packed = inputs[-3], inputs[-2], packed
        ctx.save_for_backward(x, scale, output[1], output[2])

    def modulate_backward(ctx, dy, dmean, drstd):
        op = getattr(ops, f"{prefix}adaln_modulate_backward")
        dx, dmod = op(dy, *ctx.saved_tensors, ctx.eps, ctx.rms)
        return dx, *((dmod.flatten(1),) if ctx.packed else dmod.unbind(1)), None, None, None

    def gate_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[1:])

    def gate_backward(ctx, dout):
        op = getattr(ops, f"{prefix}gate_residual_backward")
        h, gate, bias = ctx.saved_tensors  # checkpointing allows reading them once
        dh, dgate, dbias = op(dout, h, gate, bias)
        return dout, dh, dgate.squeeze(1), None if bias is None else dbias

    def both_context(ctx, inputs, output) -> None:
        packed = len(inputs) == 7
        gate, _, scale = inputs[2].chunk(3, 1) if packed else inputs[2:5]
        bias, ctx.eps, ctx.rms, _ = inputs[-4:]
        out, _, mean, rstd = output
        ctx.packed = packed
        ctx.set_materialize_grads(False)  # dout is None where only y is used: the final layer
        ctx.save_for_backward(out, inputs[1], gate, scale, bias, mean, rstd)

    def both_backward(ctx, dout, dy, dmean, drstd):
        out, h, gate, scale, bias, mean, rstd = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(out)
        op = getattr(ops, f"{prefix}gate_residual_adaln_backward")
        dx, dh, dmod, dbias = op(dout, dy, out, h, gate, scale, bias, mean, rstd, ctx.eps, ctx.rms)
        mods = (dmod.flatten(1),) if ctx.packed else dmod.unbind(1)
        return dx, dh, *mods, None if bias is None else dbias, None, None, None

    def once_only(ctx, *grads):
        raise RuntimeError(
            "adaLN operators have no second derivative: use_backend('reference') has one"
        )

    register = torch.library.register_autograd
    for op, backward, context in (
        ("adaln_modulate", modulate_backward, modulate_context),
        ("adaln_modulate_packed", modulate_backward, modulate_context),
        ("gate_residual", gate_backward, gate_context),
        ("gate_residual_adaln", both_backward, both_context),
        ("gate_residual_adaln_packed", both_backward, both_context),
    ):
        register(f"etude::{prefix}{op}", backward, setup_context=context)
        if not op.endswith("_packed"):
            register(f"etude::{prefix}{op}_backward", once_only)


def register_twin(prefix: str, device: str, forward: Callable, backward: Callable) -> None:
    """Define `etude::<prefix>...` for a twin that Inductor need not see into (C++, CUDA).

    device: the dispatch key, "CPU" or "CUDA"; the launches are those of `implementations`.
    """
    fakes = implementations(_fake_forward, _fake_backward)
    for name, kernel in implementations(forward, backward).items():
        _library.define(prefix + name + torch.library.infer_schema(kernel, mutates_args=()))
        _library.impl(prefix + name, kernel, device)
        torch.library.register_fake(f"etude::{prefix}{name}", fakes[name], lib=_library)
    register_gradients(prefix)


_KINDS = {torch.float32: 0, torch.bfloat16: 1}  # as in csrc/cpu/common.h


def _rows(t: Tensor | None) -> tuple[int, int, int, int]:
    """A tensor as the C++ side takes it; its last dimension must be contiguous."""
    if t is None:
        return _ABSENT
    strides = t.stride()
    batch = strides[0] if len(strides) > 1 else 0
    return t.data_ptr(), _KINDS[t.dtype], batch, strides[1] if len(strides) == 3 else 0


def _forward_cpu(
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
    """(out, y, mean, rstd) of the C++ kernel; None for what the operator does not have."""
    inputs = [dense(t) for t in (x, h, gate, shift, scale, bias)]
    out, y, mean, rstd = new_outputs(x, gate, scale, out_dtype)
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
        verify_forward((out, y), x, h, gate, shift, scale, bias, eps, rms, out_dtype)
    return out, y, mean, rstd


def _backward_cpu(
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
    """(dx, dh, dmodulation, dbias) of the C++ kernel; None for what does not apply."""
    if dout is not None and x is not None:
        dout = dout.to(x.dtype)  # as autograd gives it: the kernel reads both as one type
    given = [dense(t) for t in (dout, dy, x, h, gate, scale, bias)]
    made = dx, dh, dmod, dbias = new_gradients(x, h, gate, scale, bias)
    lead = x if x is not None else h
    if lead.numel() == 0:
        return tuple(None if t is None else t.zero_() for t in made)
    B, N, D = lead.shape
    chunks = -(-N // backends.cpp().ROWS_PER_CHUNK)
    partial = lead.new_empty((B, chunks, 4, D), dtype=torch.float32)
    absent = (None,) * (gate is None), (None, None) * (scale is None)
    backends.cpp().adaln_backward(
        (B, N, D),
        *(_rows(t) for t in given),
        0 if mean is None else mean.data_ptr(),
        0 if rstd is None else rstd.data_ptr(),
        *(_rows(t) for t in (dx, dh, *absent[0], *dmod.unbind(1), *absent[1])),
        _rows(None if bias is None else dbias),
        partial.data_ptr(),
        rms,
        torch.get_num_threads(),
    )
    if backends.verifying():
        verify_backward(op, made, dout, dy, x, h, gate, scale, bias, eps, rms)
    return made


register_twin("", "CPU", _forward_cpu, _backward_cpu)


def check(
    op: str,
    norm: str,
    x: Tensor,
    h: Tensor | None,
    vectors: dict[str, Tensor | None],
    modulation: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Shapes, dtypes and devices; ValueError with one sentence."""
    if norm not in NORMS:
        raise ValueError(f"{op}: norm={norm!r} is unknown: use layernorm or rmsnorm")
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be (B, N, D), got {tuple(x.shape)}")
    B, N, D = x.shape
    wanted = [("x", x, (B, N, D)), ("h", h, (B, N, D)), ("bias", bias, (D,))]
    if modulation is not None:
        if any(t is not None for t in vectors.values()):
            raise ValueError(f"{op}: modulation takes the place of {', '.join(vectors)}")
        wanted.append(("modulation", modulation, (B, len(vectors) * D)))
    else:
        missing = [name for name, t in vectors.items() if t is None]
        if missing:
            raise ValueError(f"{op}: {', '.join(missing)} missing")
        wanted += [(name, t, (B, D)) for name, t in vectors.items()]
    device = x.device
    for name, t, shape in wanted:
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{op}: {name} must be {shape}, got {tuple(t.shape)}")
        if not t.is_floating_point() or t.device != device:
            raise ValueError(f"{op}: {name} is {t.dtype} on {t.device}; x is {x.dtype} on {device}")
    if modulation is None and len({t.dtype for t in vectors.values()}) > 1:
        raise ValueError(f"{op}: {', '.join(vectors)} must have one dtype")


def output_dtype(x: Tensor) -> torch.dtype | None:
    """The autocast rule: y is what the next matmul would cast it to."""
    kind = x.device.type
    known = kind in ("cpu", "cuda")  # torch raises for devices without autocast, such as meta
    if known and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _twin(op: str, x: Tensor, *others: Tensor | torch.dtype | None) -> str | None:
    """The prefix of the twin's operators for this call; None for the reference."""
    dtypes = [getattr(t, "dtype", t) for t in others if t is not None]
    backend = backends.pick(op, x.device.type, x.dtype, *dtypes, twins=_TWINS)
    if backend == "cuda":
        from . import adaln_cuda  # registers the CUDA operators on first use

        h = None if op == "adaln_modulate" else others[0]
        to = others[-1] if isinstance(others[-1], torch.dtype) else None
        if not adaln_cuda.fits(x, h, to, op != "gate_residual"):
            backend = "triton" if backends.HAS_TRITON else "reference"
    if backend == "triton":
        from . import adaln_triton  # noqa: F401  (registers the Triton operators on first use)
    return {"reference": None, "cpp": ""}.get(backend, f"{backend}_")


def adaln_modulate(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    modulation: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layernorm",
) -> Tensor:
    """norm(x) * (1 + scale) + shift.

    x: (B, N, D); shift, scale: (B, D), any strides (`chunk` views are taken as they are), or in
    their place modulation: (B, 2 D), shift then scale; float16, bfloat16, float32 or float64.
    norm: "layernorm" or "rmsnorm". Returns (B, N, D) of x's dtype (under autocast, the autocast
    dtype). Errors: ValueError for shapes, dtypes or devices that do not fit together; RuntimeError
    for a backend asked for by name that cannot run.
    """
    op = "adaln_modulate"
    check(op, norm, x, None, {"shift": shift, "scale": scale}, modulation, None)
    to = output_dtype(x)
    vectors = (shift, scale) if modulation is None else (modulation,)
    twin = _twin(op, x, vectors[0], to)
    if twin is None:
        if modulation is not None:
            shift, scale = modulation.chunk(2, 1)
        return adaln_modulate_reference(x, shift, scale, eps=eps, norm=norm, out_dtype=to)
    call = getattr(ops, twin + op + "_packed" * (modulation is not None))
    return call(x, *vectors, eps, norm == "rmsnorm", to)[0]


def gate_residual(x: Tensor, h: Tensor, gate: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """x + gate * (h + bias).

    x, h: (B, N, D); gate: (B, D); bias: (D,), none is zero. Returns (B, N, D) of x's dtype, always.
    Strides, dtypes and errors as in `adaln_modulate`.
    """
    op = "gate_residual"
    check(op, "layernorm", x, h, {"gate": gate}, None, bias)
    twin = _twin(op, x, h, gate, bias)
    if twin is None:
        return gate_residual_reference(x, h, gate, bias=bias)
    return getattr(ops, twin + op)(x, h, gate, bias)


def gate_residual_adaln(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    modulation: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layernorm",
) -> tuple[Tensor, Tensor]:
    """(out, y): out = x + gate * (h + bias) and y = adaln_modulate(out, shift, scale), in one pass.

    x, h: (B, N, D); gate, shift, scale: (B, D), or in their place modulation: (B, 3 D) in that
    order; bias: (D,), none is zero. out has x's dtype; y has x's dtype or, under autocast, the
    autocast dtype. Strides, dtypes and errors as in `adaln_modulate`.
    """
    op = "gate_residual_adaln"
    check(op, norm, x, h, {"gate": gate, "shift": shift, "scale": scale}, modulation, bias)
    to = output_dtype(x)
    vectors = (gate, shift, scale) if modulation is None else (modulation,)
    twin = _twin(op, x, h, vectors[0], bias, to)
    if twin is None:
        if modulation is not None:
            vectors = modulation.chunk(3, 1)
        return gate_residual_adaln_reference(
            x, h, *vectors, bias=bias, eps=eps, norm=norm, out_dtype=to
        )
    call = getattr(ops, twin + op + "_packed" * (modulation is not None))
    return call(x, h, *vectors, bias, eps, norm == "rmsnorm", to)[:2]


OPERATORS = (
    Operator("adaln_modulate", "LayerNorm or RMSNorm, per-sample shift and scale", _TWINS),
    Operator("gate_residual", "x + gate * (h + bias)", _TWINS),
    Operator("gate_residual_adaln", "gate_residual, then adaln_modulate, in one pass", _TWINS),
)
