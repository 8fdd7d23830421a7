"""GroupNorm with weight and bias, and SiLU after it, as U-Nets and VAEs have before a convolution.

Called by convolutional models (public function `groupnorm_silu`). For x: (B, C, H, W), the C / G
channels of a group and its m = C / G * H * W elements

    normed = (x - mean) * rstd         mean, rstd over the group, rstd = 1 / sqrt(var + eps)
    v = normed * weight + bias         weight, bias: (C,)
    y = silu(v) = v sigmoid(v)         or v, with silu=False

(Wu and He, "Group Normalization", 2018). Backward, with d = dy * silu'(v) recomputed from x:

    dweight = sum_{b,h,w} d * normed;  dbias = sum_{b,h,w} d
    dx = rstd * (weight d - mean(weight d) - normed * mean(weight d normed)), means over the group

A variance is never a difference of large numbers: parts of a group leave a mean and a sum of
squared deviations, which are merged pairwise (Chan, Golub and LeVeque, 1983). Arithmetic is in
float32 (float64 for float64 inputs), sums are taken in fixed stages. y has the dtype of x, or under
autocast the autocast dtype (what the next convolution takes), and the memory layout of x.

Layouts. Channels last (NHWC strides, slices along the channels included) is what convolutions on
tensor cores take and what every twin is written for. Contiguous NCHW has its own loops in C++
(the reference below 256 positions in float32, where torch is faster); on a GPU it runs the
reference. Other strides are copied to NCHW first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .catalogue import Operator
from .tensors import dense, new_like, wide_dtype


def groupnorm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`groupnorm_silu` in plain torch, differentiated by autograd; x: (B, C, ...).

    On the CPU torch takes a channels-last tensor's variance as E[x^2] - E[x]^2: it is copied first.
    """
    wide = wide_dtype(x)
    last = x.dim() == 4 and is_channels_last(x)
    x, weight, bias, dtype = x.to(wide), weight.to(wide), bias.to(wide), out_dtype or x.dtype
    if x.numel():
        v = torch.group_norm(x.contiguous(), num_groups, weight, bias, eps)
    else:  # torch leaves the gradients of weight and bias undefined
        v = x * weight.view(-1, *[1] * (x.dim() - 2)) + bias.view(-1, *[1] * (x.dim() - 2))
    y = (F.silu(v) if silu else v).to(dtype)
    return y.contiguous(memory_format=torch.channels_last) if last else y


def backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of (B, C, S) tensors by the equations above, for `ETUDE_VERIFY`."""
    B, C, S = x.shape
    width = C // mean.shape[1]
    centre, scale = (t.repeat_interleave(width, 1).unsqueeze(2) for t in (mean, rstd))
    w, shift = weight.float()[:, None], bias.float()[:, None]
    normed = (x.float() - centre) * scale
    d = dy.float()
    if silu:
        v = normed * w + shift
        s = v.sigmoid()
        d = d * s * (1 + v * (1 - s))
    groups = (B, mean.shape[1], width * S)
    average = (d * w).reshape(groups).mean(2).repeat_interleave(width, 1).unsqueeze(2)
    slope = (d * w * normed).reshape(groups).mean(2).repeat_interleave(width, 1).unsqueeze(2)
    dx = scale * (d * w - average - normed * slope)
    return dx, (d * normed).sum((0, 2)), d.sum((0, 2))


# The C++ twin as torch operators, on (B, S, C) tensors (channels last) or (B, C, S) ones.
_library = torch.library.Library("etude", "FRAGMENT")
_SCHEMAS = {
    "groupnorm_silu": "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu, "
    "bool channels_last, ScalarType? out_dtype) -> (Tensor, Tensor, Tensor)",
    "groupnorm_silu_backward": "(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, "
    "Tensor rstd, bool silu, bool channels_last) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
ops = torch.ops.etude


def group_values(x: Tensor, groups: int) -> Tensor:
    return x.new_empty((x.shape[0], groups), dtype=torch.float32)


def _rows(t: Tensor) -> tuple[int, int, int, int]:
    """A (B, rows, columns) or (C,) tensor as the C++ side takes it."""
    kind = backends.cpp().BFLOAT16 if t.dtype == torch.bfloat16 else backends.cpp().FLOAT32
    strides = (t.stride(0), t.stride(1)) if t.dim() == 3 else (0, 0)
    return t.data_ptr(), kind, *strides


def _size(x: Tensor, groups: int, channels_last: bool) -> tuple[int, int, int, int]:
    """B, S, C, groups."""
    S, C = x.shape[1:] if channels_last else reversed(x.shape[1:])
    return x.shape[0], S, C, groups


def _forward_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    channels_last: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = new_like(x, out_dtype), group_values(x, groups), group_values(x, groups)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    size = B, S, C, _ = _size(x, groups, channels_last)
    chunks = -(-S // backends.cpp().GROUPNORM_POSITIONS)
    partial = x.new_empty((B, chunks, 2, C), dtype=torch.float32)
    given = (dense(x), weight.contiguous(), bias.contiguous(), y)
    backends.cpp().groupnorm_forward(
        size,
        *map(_rows, given),
        *(t.data_ptr() for t in (mean, rstd, partial)),
        eps,
        silu,
        channels_last,
        torch.get_num_threads(),
    )
    if backends.verifying():
        first = x.transpose(1, 2) if channels_last else x
        want = groupnorm_silu_reference(first, groups, weight, bias, eps, silu, out_dtype=out_dtype)
        want = want.transpose(1, 2) if channels_last else want
        backends.verify("C++ groupnorm_silu", ("y",), (y,), (want,))
    return y, mean, rstd


def _backward_cpu(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    made = new_like(x), new_like(weight), new_like(bias)
    if x.numel() == 0:
        return tuple(t.zero_() for t in made)
    size = B, S, C, _ = _size(x, mean.shape[1], channels_last)
    chunks = -(-S // backends.cpp().GROUPNORM_POSITIONS)
    partial = x.new_empty((B, chunks + 1, 2, C), dtype=torch.float32)
    wide = silu and x.dtype != torch.float32
    kept = x.new_empty(x.shape, dtype=torch.float32) if wide else made[0]
    given = (dense(dy), dense(x), weight.contiguous(), bias.contiguous())
    backends.cpp().groupnorm_backward(
        size,
        *map(_rows, given),
        mean.data_ptr(),
        rstd.data_ptr(),
        *map(_rows, (*made, kept)),
        partial.data_ptr(),
        silu,
        channels_last,
        torch.get_num_threads(),
    )
    if backends.verifying():
        verify_backward("C++ groupnorm_silu_backward", made, given, mean, rstd, silu, channels_last)
    return made


def verify_backward(
    op: str,
    made: tuple[Tensor, ...],
    given: tuple[Tensor, ...],
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    channels_last: bool,
) -> None:
    """Compare (dx, dweight, dbias) with the reference; given: dy, x, weight, bias."""
    dy, x = (t.transpose(1, 2) if channels_last else t for t in given[:2])
    want = backward_reference(dy, x, *given[2:], mean, rstd, silu)
    dx = want[0].transpose(1, 2) if channels_last else want[0]
    backends.verify(op, ("dx", "dweight", "dbias"), made, (dx, *want[1:]))


_library.impl("groupnorm_silu", _forward_cpu, "CPU")
_library.impl("groupnorm_silu_backward", _backward_cpu, "CPU")


@torch.library.register_fake("etude::groupnorm_silu", lib=_library)
def _(x, weight, bias, groups, eps, silu, channels_last, out_dtype):
    return new_like(x, out_dtype), group_values(x, groups), group_values(x, groups)


@torch.library.register_fake("etude::groupnorm_silu_backward", lib=_library)
def _(dy, x, weight, bias, mean, rstd, silu, channels_last):
    return new_like(x), new_like(weight), new_like(bias)


def register_gradients(prefix: str) -> None:
    """Give `etude::<prefix>groupnorm_silu` its backward operator, which has none itself."""

    def context(ctx, inputs, output) -> None:
        x, weight, bias, _, _, ctx.silu, ctx.channels_last, _ = inputs
        ctx.save_for_backward(x, weight, bias, output[1], output[2])

    def backward(ctx, dy, dmean, drstd):
        op = getattr(ops, f"{prefix}groupnorm_silu_backward")
        grads = op(dy, *ctx.saved_tensors, ctx.silu, ctx.channels_last)
        return *grads, None, None, None, None, None

    def refuse(ctx, *grads):
        raise RuntimeError(
            "etude::groupnorm_silu_backward cannot be differentiated again: run with "
            "ETUDE_KERNELS=reference"
        )

    register = torch.library.register_autograd
    register(f"etude::{prefix}groupnorm_silu", backward, setup_context=context)
    register(f"etude::{prefix}groupnorm_silu_backward", refuse)


register_gradients("")


def _check(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> None:
    """Dtypes, devices and shapes; ValueError with one sentence."""
    if x.dim() != 4:
        raise ValueError(f"groupnorm_silu: x must be (B, C, H, W), got {tuple(x.shape)}")
    C = x.shape[1]
    if num_groups < 1 or C % num_groups:
        raise ValueError(f"groupnorm_silu: {num_groups} groups do not divide {C} channels")
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if not t.is_floating_point() or t.device != x.device:
            raise ValueError(
                f"groupnorm_silu: {name} is {t.dtype} on {t.device}; x is {x.dtype} on {x.device}"
            )
        if name != "x" and tuple(t.shape) != (C,):
            raise ValueError(f"groupnorm_silu: {name} must be {(C,)}, got {tuple(t.shape)}")


def _output_dtype(x: Tensor) -> torch.dtype | None:
    """The autocast rule: y is what the next convolution would cast it to."""
    kind = x.device.type
    known = kind in ("cpu", "cuda")  # torch raises for devices without autocast, such as meta
    if known and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def is_channels_last(x: Tensor) -> bool:
    """Whether positions of x: (B, C, H, W) are rows of contiguous channels, one stride apart."""
    C, H, W = x.shape[1:]
    columns = C == 1 or x.stride(1) == 1
    rows = H == 1 or W == 1 or x.stride(2) == W * x.stride(3)
    # A row may be part of a wider one (a slice of channels), but not overlap the next.
    step = x.stride(3) if W > 1 else x.stride(2)
    return columns and rows and (H * W == 1 or step >= C)


def groupnorm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """silu(GroupNorm(x) * weight + bias), or without SiLU.

    x: (B, C, H, W), channels last or contiguous (other strides are copied); weight, bias: (C,);
    float16, bfloat16, float32 or float64. Returns (B, C, H, W) of x's dtype (under autocast, the
    autocast dtype) and layout. Errors: ValueError for shapes, dtypes, devices or groups that do not
    fit together; RuntimeError for a backend asked for by name that cannot run.
    """
    _check(x, num_groups, weight, bias)
    to = _output_dtype(x)
    dtypes = (x.dtype, weight.dtype, bias.dtype, to or x.dtype)
    backend = backends.pick("groupnorm_silu", x.device.type, *dtypes)
    last = is_channels_last(x)
    if backend == "cpp" and not last and x.dtype == torch.float32 and x.shape[2] * x.shape[3] < 256:
        backend = "reference"
    if backend == "reference" or (backend == "triton" and not last):
        return groupnorm_silu_reference(x, num_groups, weight, bias, eps, silu, out_dtype=to)
    if backend == "triton":
        from . import groupnorm_triton  # noqa: F401

        op = ops.triton_groupnorm_silu
    else:
        op = ops.groupnorm_silu
    B, C, H, W = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(B, H * W, C) if last else x.reshape(B, C, H * W)
    y = op(rows, weight, bias, num_groups, eps, silu, last, to)[0]
    return y.view(B, H, W, C).permute(0, 3, 1, 2) if last else y.view(B, C, H, W)


OPERATORS = (
    Operator("groupnorm_silu", "GroupNorm with weight and bias, then SiLU", ("cpp", "triton")),
)
