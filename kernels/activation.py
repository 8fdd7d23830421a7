"""Activations of the transformer's MLP: bias and GELU, SwiGLU, and the linear layers around them.

Called by the models' MLP. For x: (..., D), bias: (D,)

    bias_gelu:    y = gelu(x + bias)
                  tanh form   gelu(z) = z sigmoid(2 u),  u = sqrt(2/pi) (z + 0.044715 z^3)
                  erf form    gelu(z) = z Phi(z),        Phi the normal distribution
    swiglu:       y = silu(gate) * value,  silu(g) = g sigmoid(g)
    linear_gelu:  y = gelu(x weight^T + bias)
    mlp:          y = gelu(x w1^T + b1) w2^T + b2

(Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, whose 0.5 z (1 + tanh(u)) is the same as
z sigmoid(2 u) and cancels for negative z; Shazeer, "GLU Variants Improve Transformer", 2020).
Backward, with z = x + bias, in one pass that keeps nothing but x:

    dz = dy gelu'(z);  dx = dz;  dbias = sum over rows of dz
    tanh form   gelu'(z) = s + z s (1 - s) 2 u',  s = sigmoid(2 u)
    erf form    gelu'(z) = Phi(z) + z phi(z)
    dgate = dy value s (1 + gate (1 - s)),  dvalue = dy silu(gate),  s = sigmoid(gate)

All arithmetic is in float32 (float64 for float64 inputs); the bias' gradient is summed in two fixed
stages, so it has the same bits for any number of threads. y has the dtype of x, or under autocast
the autocast dtype. No operator has a second derivative except in its reference.

The two products of `mlp` dominate it, so how they are made is a plan, which
`ETUDE_KERNELS=auto,mlp=epilogue` (or `linear_gelu=`) chooses:

    split     products of the vendor's library, and one kernel for bias and GELU between them
    epilogue  Triton products whose last step applies bias and GELU (forward) and GELU's slope with
              the bias' sums (backward): 2 of 8 passes over the hidden layer are saved forward, 3
              of 11 backward, if the product itself is as fast as the library's
    library   as split, but inference with the tanh form through cuBLASLt's own epilogue

`split` is the default everywhere: the other two are taken only where `etude kernels tune` measured
them to be faster, or where they are asked for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .catalogue import Operator
from .tensors import new_like, wide_dtype

_FORMS = ("tanh", "none")
_ABSENT = (0, 0, 0, 0)
PLANS = tuple(backends.OWN_CHOICES["mlp"])


def bias_gelu_reference(
    x: Tensor,
    bias: Tensor | None,
    approximate: str = "tanh",
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`bias_gelu` in plain torch, differentiated by autograd."""
    z = x.to(wide_dtype(x))
    z = z if bias is None else z + bias.to(z.dtype)
    return F.gelu(z, approximate=approximate).to(out_dtype or x.dtype)


def swiglu_reference(
    x: Tensor, value: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`swiglu` in plain torch, differentiated by autograd."""
    gate, value = x.chunk(2, -1) if value is None else (x, value)
    wide = wide_dtype(x)
    return (F.silu(gate.to(wide)) * value.to(wide)).to(out_dtype or x.dtype)


def linear_gelu_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = "tanh"
) -> Tensor:
    """`linear_gelu` in plain torch: its product has the dtype of its inputs, as F.linear's has."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate="tanh"
) -> Tensor:
    """`mlp` in plain torch, differentiated by autograd."""
    return F.linear(linear_gelu_reference(x, w1, b1, approximate), w2, b2)


def bias_gelu_backward_reference(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dbias) in float32, for `ETUDE_VERIFY`."""
    z = x.float() if bias is None else x.float() + bias.float()
    dx = torch.ops.aten.gelu_backward(dy.float(), z, approximate="tanh" if tanh else "none")
    return dx, dx.reshape(-1, x.shape[-1]).sum(0)


def swiglu_backward_reference(dy: Tensor, x: Tensor, value: Tensor | None) -> list[Tensor]:
    """[dx] or [dgate, dvalue] in float32, for `ETUDE_VERIFY`."""
    gate, other = x.chunk(2, -1) if value is None else (x, value)
    grad, gate, other = dy.float(), gate.float(), other.float()
    s = gate.sigmoid()
    made = [grad * other * s * (1 + gate * (1 - s)), grad * gate * s]
    return [torch.cat(made, -1)] if value is None else made


# The C++ twin as torch operators. An absent second tensor is returned as one of size 0.
_library = torch.library.Library("etude", "FRAGMENT")
_SCHEMAS = {
    "bias_gelu": "(Tensor x, Tensor? bias, bool tanh, ScalarType? out_dtype) -> Tensor",
    "bias_gelu_backward": "(Tensor dy, Tensor x, Tensor? bias, bool tanh, bool sums) "
    "-> (Tensor, Tensor)",
    "swiglu": "(Tensor x, Tensor? value, ScalarType? out_dtype) -> Tensor",
    "swiglu_backward": "(Tensor dy, Tensor x, Tensor? value) -> (Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
ops = torch.ops.etude


def flat(t: Tensor) -> Tensor:
    """(..., D) as (N, D) with contiguous columns; a view unless the strides forbid it."""
    width = t.shape[-1]
    rows = t.reshape(t.numel() // width if width else 0, width)
    return rows if rows.stride(-1) == 1 or width == 1 else rows.contiguous()


def _rows(t: Tensor | None) -> tuple[int, int, int, int]:
    """A (N, D) or (D,) tensor as the C++ side takes it."""
    if t is None:
        return _ABSENT
    kind = backends.cpp().BFLOAT16 if t.dtype == torch.bfloat16 else backends.cpp().FLOAT32
    return t.data_ptr(), kind, 0, t.stride(0) if t.dim() == 2 else 0


def new_sums(x: Tensor, bias: Tensor | None, sums: bool) -> Tensor:
    """The bias' gradient, of the bias' dtype; of size 0 where it is not wanted."""
    return (x if bias is None else bias).new_empty(x.shape[-1] if sums else 0)


def new_swiglu(x: Tensor, value: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    width = x.shape[-1] // 2 if value is None else x.shape[-1]
    return x.new_empty((*x.shape[:-1], width), dtype=dtype or x.dtype)


def halves(x: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and value as (N, D), from one packed tensor or two."""
    if value is not None:
        return flat(x), flat(value)
    rows = flat(x)
    width = x.shape[-1] // 2
    return rows[:, :width], rows[:, width:]


def _bias_gelu_cpu(
    x: Tensor, bias: Tensor | None, tanh: bool, out_dtype: torch.dtype | None
) -> Tensor:
    y = new_like(x, out_dtype)
    if x.numel():
        given = flat(x), None if bias is None else bias.contiguous(), flat(y)
        size = tuple(given[0].shape)
        backends.cpp().gelu_forward(size, *map(_rows, given), tanh, torch.get_num_threads())
    if backends.verifying():
        want = bias_gelu_reference(x, bias, _FORMS[not tanh], out_dtype=out_dtype)
        backends.verify("C++ bias_gelu", ("y",), (y,), (want,))
    return y


def _bias_gelu_backward_cpu(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, sums: bool
) -> tuple[Tensor, Tensor]:
    dx, dbias = new_like(x), new_sums(x, bias, sums)
    if x.numel() == 0:
        return dx, dbias.zero_()
    rows = flat(x)
    chunks = -(-rows.shape[0] // backends.cpp().ACTIVATION_ROWS)
    partial = x.new_empty((chunks if sums else 0, rows.shape[1]), dtype=torch.float32)
    # Kept in a variable: C++ sees addresses only, which must outlive the call.
    given = flat(dy), rows, None if bias is None else bias.contiguous()
    backends.cpp().gelu_backward(
        tuple(rows.shape),
        *map(_rows, (*given, flat(dx), dbias if sums else None)),
        partial.data_ptr(),
        tanh,
        torch.get_num_threads(),
    )
    if backends.verifying():
        want = bias_gelu_backward_reference(dy, x, bias, tanh)
        made = dx, dbias if sums else None
        backends.verify("C++ bias_gelu_backward", ("dx", "dbias"), made, want)
    return dx, dbias


def _swiglu_cpu(x: Tensor, value: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    y = new_swiglu(x, value, out_dtype)
    if y.numel():
        given = (*halves(x, value), flat(y))
        size = tuple(given[0].shape)
        backends.cpp().swiglu_forward(size, *map(_rows, given), torch.get_num_threads())
    if backends.verifying():
        want = swiglu_reference(x, value, out_dtype=out_dtype)
        backends.verify("C++ swiglu", ("y",), (y,), (want,))
    return y


def _swiglu_backward_cpu(dy: Tensor, x: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
    dx = new_like(x)
    dvalue = x.new_empty(0) if value is None else new_like(value)
    if dy.numel():
        made = halves(dx, None if value is None else dvalue)
        given = (flat(dy), *halves(x, value), *made)
        size = tuple(given[0].shape)
        backends.cpp().swiglu_backward(size, *map(_rows, given), torch.get_num_threads())
    if backends.verifying():
        want = swiglu_backward_reference(dy, x, value)
        names = ("dx", "dvalue")[: len(want)]
        backends.verify("C++ swiglu_backward", names, (dx, dvalue)[: len(want)], want)
    return dx, dvalue


for _name, _kernel in {
    "bias_gelu": _bias_gelu_cpu,
    "bias_gelu_backward": _bias_gelu_backward_cpu,
    "swiglu": _swiglu_cpu,
    "swiglu_backward": _swiglu_backward_cpu,
}.items():
    _library.impl(_name, _kernel, "CPU")


@torch.library.register_fake("etude::bias_gelu", lib=_library)
def _(x, bias, tanh, out_dtype):
    return new_like(x, out_dtype)


@torch.library.register_fake("etude::bias_gelu_backward", lib=_library)
def _(dy, x, bias, tanh, sums):
    return new_like(x), new_sums(x, bias, sums)


@torch.library.register_fake("etude::swiglu", lib=_library)
def _(x, value, out_dtype):
    return new_swiglu(x, value, out_dtype)


@torch.library.register_fake("etude::swiglu_backward", lib=_library)
def _(dy, x, value):
    return new_like(x), x.new_empty(0) if value is None else new_like(value)


def refuse_second_derivative(name: str) -> None:
    """A second backward through the operator `etude::<name>` raises instead of being wrong."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"etude::{name} cannot be differentiated again: run with ETUDE_KERNELS=reference"
        )

    torch.library.register_autograd(f"etude::{name}", backward)


def register_gradients(prefix: str) -> None:
    """Give the operators named `etude::<prefix>...` their backward operators.

    Called here for the C++ operators and by `activation_triton` for the Triton ones.
    """

    def gelu_context(ctx, inputs, output) -> None:
        x, bias, ctx.tanh, _ = inputs
        ctx.save_for_backward(x, bias)

    def gelu_backward(ctx, dy):
        x, bias = ctx.saved_tensors
        sums = bias is not None and ctx.needs_input_grad[1]
        op = getattr(ops, f"{prefix}bias_gelu_backward")
        dx, dbias = op(dy, x, bias, ctx.tanh, sums)
        return dx, dbias if sums else None, None, None

    def swiglu_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])

    def swiglu_backward(ctx, dy):
        x, value = ctx.saved_tensors
        dx, dvalue = getattr(ops, f"{prefix}swiglu_backward")(dy, x, value)
        return dx, None if value is None else dvalue, None

    register = torch.library.register_autograd
    register(f"etude::{prefix}bias_gelu", gelu_backward, setup_context=gelu_context)
    register(f"etude::{prefix}swiglu", swiglu_backward, setup_context=swiglu_context)
    for name in ("bias_gelu_backward", "swiglu_backward"):
        refuse_second_derivative(prefix + name)


register_gradients("")


def plan(op: str, dtype: torch.dtype) -> str:
    """How `linear_gelu` or `mlp` makes its products on a GPU: one of `PLANS`.

    Nothing is assumed about a GPU that has not been measured, and cuBLAS is the safe choice: these
    products are short (1152 columns are 18 steps of 64), so that whether an epilogue in Triton pays
    depends on the GPU and on the library's version. Products in float32 are always split.
    """
    asked = backends.choice(op)
    return asked if asked in PLANS and dtype in (torch.float16, torch.bfloat16) else "split"


def _check(
    op: str, approximate: str, x: Tensor, others: dict[str, tuple[Tensor | None, tuple[int, ...]]]
) -> None:
    """Dtypes, devices and shapes; ValueError with one sentence."""
    if approximate not in _FORMS:
        raise ValueError(f"{op}: approximate={approximate!r} is unknown: use tanh or none")
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    for name, (t, shape) in {"x": (x, tuple(x.shape)), **others}.items():
        if t is None:
            continue
        if not t.is_floating_point() or t.device != x.device:
            raise ValueError(
                f"{op}: {name} is {t.dtype} on {t.device}; x is {x.dtype} on {x.device}"
            )
        if tuple(t.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} must be {tuple(shape)}, got {tuple(t.shape)}")


def _output_dtype(x: Tensor) -> torch.dtype | None:
    """The autocast rule: y is what the next matmul would cast it to."""
    kind = x.device.type
    known = kind in ("cpu", "cuda")  # torch raises for devices without autocast, such as meta
    if known and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _triton() -> None:
    """Register the Triton operators on first use."""
    from . import activation_triton  # noqa: F401


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias), by GELU's tanh form or, with approximate="none", by its erf form.

    x: (..., D), any strides; bias: (D,), or None where x already has it; float16, bfloat16, float32
    or float64. Returns (..., D) of x's dtype (under autocast, the autocast dtype). Errors:
    ValueError for shapes, dtypes or devices that do not fit together; RuntimeError for a backend
    asked for by name that cannot run.
    """
    _check("bias_gelu", approximate, x, {"bias": (bias, tuple(x.shape[-1:]))})
    to = _output_dtype(x)
    dtypes = (x.dtype, to or x.dtype, *([] if bias is None else [bias.dtype]))
    backend = backends.pick("bias_gelu", x.device.type, *dtypes)
    if backend == "reference":
        return bias_gelu_reference(x, bias, approximate, out_dtype=to)
    if backend == "triton":
        _triton()
        return ops.triton_bias_gelu(x, bias, approximate == "tanh", to)
    return ops.bias_gelu(x, bias, approximate == "tanh", to)


def swiglu(x: Tensor, value: Tensor | None = None) -> Tensor:
    """silu(gate) * value, with x = [gate | value] along the last dimension, or as two tensors.

    x: (..., 2 D), the gate in the first D columns; or x: (..., D) the gate and value: (..., D). Any
    strides; dtypes and errors as in `bias_gelu`. Returns (..., D).
    """
    _check("swiglu", "tanh", x, {"value": (value, tuple(x.shape))})
    if value is None and x.shape[-1] % 2:
        raise ValueError(f"swiglu: x must have an even last dimension, got {tuple(x.shape)}")
    if value is not None and value.dtype != x.dtype:
        raise ValueError(f"swiglu: x and value must have one dtype, got {x.dtype}, {value.dtype}")
    to = _output_dtype(x)
    backend = backends.pick("swiglu", x.device.type, x.dtype, to or x.dtype)
    if backend == "reference":
        return swiglu_reference(x, value, out_dtype=to)
    if backend == "triton":
        _triton()
        return ops.triton_swiglu(x, value, to)
    return ops.swiglu(x, value, to)


def _linear_check(op: str, x: Tensor, w: Tensor, b: Tensor | None, more: dict | None = None) -> str:
    """The checks of `linear_gelu` and `mlp`; the backend that all of their tensors allow."""
    if w.dim() != 2:
        raise ValueError(f"{op}: weights must be (out, in), got {tuple(w.shape)}")
    others = {
        "the first weight": (w, (w.shape[0], *x.shape[-1:])),
        "the first bias": (b, tuple(w.shape[:1])),
    } | (more or {})
    _check(op, "tanh", x, others)
    tensors = [x, *(t for t, _ in others.values() if t is not None)]
    return backends.pick(op, x.device.type, *(t.dtype for t in tensors))


def _hidden(
    how: str, x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, to: torch.dtype
) -> Tensor:
    """`linear_gelu` by the plan `split` or `library`."""
    quiet = not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    )
    if how == "library" and quiet and bias is not None and approximate == "tanh":
        rows = flat(x.to(to))
        made = torch.ops.aten._addmm_activation(bias.to(to), rows, weight.to(to).t(), use_gelu=True)
        return made.view(*x.shape[:-1], weight.shape[0])
    return bias_gelu(F.linear(x, weight), bias, approximate)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = "tanh"
) -> Tensor:
    """gelu(x weight^T + bias). x: (..., K); weight: (N, K); bias: (N,) or None. Returns (..., N).

    One dtype, as F.linear asks for, or any under autocast. Errors as in `bias_gelu`.
    """
    backend = _linear_check("linear_gelu", x, weight, bias)
    if approximate not in _FORMS:
        raise ValueError(f"linear_gelu: approximate={approximate!r} is unknown: use tanh or none")
    if backend == "reference":
        return linear_gelu_reference(x, weight, bias, approximate)
    to = _output_dtype(x) or x.dtype
    how = plan("linear_gelu", to) if backend == "triton" else "split"
    if how == "epilogue":
        _triton()
        given = [None if t is None else t.to(to) for t in (x, weight, bias)]
        return ops.triton_linear_gelu(*given, approximate == "tanh")[0]
    return _hidden(how, x, weight, bias, approximate, to)


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str = "tanh",
) -> Tensor:
    """gelu(x w1^T + b1) w2^T + b2: a transformer's two-layer perceptron.

    x: (..., K); w1: (N, K); w2: (M, N); b1: (N,), b2: (M,), or None. Returns (..., M). Dtypes and
    errors as in `linear_gelu`.
    """
    if w2.dim() != 2:
        raise ValueError(f"mlp: weights must be (out, in), got {tuple(w2.shape)}")
    more = {
        "the second weight": (w2, (w2.shape[0], *w1.shape[:1])),
        "the second bias": (b2, tuple(w2.shape[:1])),
    }
    backend = _linear_check("mlp", x, w1, b1, more)
    if approximate not in _FORMS:
        raise ValueError(f"mlp: approximate={approximate!r} is unknown: use tanh or none")
    if backend == "reference":
        return mlp_reference(x, w1, b1, w2, b2, approximate)
    to = _output_dtype(x) or x.dtype
    how = plan("mlp", to) if backend == "triton" else "split"
    if how == "epilogue":
        _triton()
        given = [None if t is None else t.to(to) for t in (x, w1, b1, w2, b2)]
        return ops.triton_mlp(*given, approximate == "tanh")[0]
    return F.linear(_hidden(how, x, w1, b1, approximate, to), w2, b2)


_TWINS = ("cpp", "triton")
OPERATORS = (
    Operator("bias_gelu", "gelu(x + bias), tanh or erf form", _TWINS),
    Operator("swiglu", "silu(gate) * value, packed or as two tensors", _TWINS),
    Operator("linear_gelu", "linear layer with bias and GELU", _TWINS),
    Operator("mlp", "linear, GELU, linear", _TWINS),
)
