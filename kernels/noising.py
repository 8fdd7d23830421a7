"""Noise by position, noising, and the losses of diffusion training in one pass each.

Called by the engine's objectives and training. For latents x0 (B, C, ...), a position per sample,
and per-sample alpha and sigma, with eps the normals of `philox.py` at those positions:

    noise_like       eps
    diffuse          x_t = alpha x0 + sigma eps
    diffusion_loss   weight mean((prediction - target)^2) + bound, one number per sample

    target = eps - x0              flow   (Lipman et al. 2023; t = 1 is noise)
             eps                   eps    (Ho et al. 2020)
             alpha eps - sigma x0  v      (Salimans and Ho 2022)
             x0                    x0

No operator stores the noise. Each draws what it needs again from the counters, in registers or in
the first-level cache: ten rounds of integer arithmetic cost less than writing four bytes per
element and reading them twice more, in the loss and in its backward pass. The gradient is

    d prediction = dloss weight 2 (prediction - target) / n        n = C * ...

Learned variances (Nichol and Dhariwal 2021, "Improved denoising diffusion probabilistic models",
section 3.1; DiT): prediction has 2 C channels, the second half v a fraction between the logarithms
of the smallest and the largest variance of the step, f = (v + 1) / 2:

    log_hat = f log_largest + (1 - f) log_smallest
    miss    = mean_scale (prediction - eps)
    bound   = mean(log_hat - log_smallest - 1 + exp(log_smallest - log_hat)
                   + miss^2 exp(-log_hat)) / (2 log 2)

with miss the difference of the two posteriors' means, held fixed (no gradient). In mean_scale =
from_x0 sigma / alpha nothing cancels, unlike in a difference of two means. At the first entry of a
table the term is the likelihood of the 8-bit level of x0 instead. The element order of the counters
is the logical one, (c, h, w): memory format and batch have no say in which noise a sample gets.

Arithmetic and sums are float32 (float64 for float64 inputs); sums are taken in two fixed stages
over chunks of 1,024 elements, so a sample's loss has the same bits in any batch.
"""

import math

import torch
from torch import Tensor

from . import backends
from .catalogue import Operator
from .philox import MASK, normals
from .tensors import wide_dtype

TARGETS = ("flow", "eps", "v", "x0")
_ABSENT = (0, 0, 0, 0, 0)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(wide_dtype(like)).view(-1, *[1] * (like.dim() - 1))


def noise_like_reference(x: Tensor, positions: Tensor, *, seed: int, stream: int) -> Tensor:
    """`noise_like` in plain torch: the engine's noise, bit for bit in float32."""
    return normals(seed, stream, positions, tuple(x.shape[1:])).to(x.dtype)


def diffuse_reference(
    x0: Tensor,
    positions: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    seed: int,
    stream: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`diffuse` in plain torch, differentiated by autograd."""
    eps = normals(seed, stream, positions, tuple(x0.shape[1:])).to(wide_dtype(x0))
    return (_column(alpha, x0) * x0 + _column(sigma, x0) * eps).to(dtype or x0.dtype)


def diffusion_loss_reference(
    prediction: Tensor,
    x0: Tensor,
    positions: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    seed: int,
    stream: int,
    target: str,
    weight: Tensor | None = None,
    bound: Tensor | None = None,
) -> Tensor:
    """`diffusion_loss` in plain torch, differentiated by autograd."""
    wide = wide_dtype(prediction, x0)
    eps = normals(seed, stream, positions, tuple(x0.shape[1:])).to(wide)
    clean, output = x0.to(wide), prediction.to(wide)
    output, variance = output[:, : x0.shape[1]], output[:, x0.shape[1] :]
    wanted = _target(target, clean, eps, alpha, sigma)
    losses = (output - wanted).square().flatten(1).mean(1)
    if weight is not None:
        losses = losses * weight.to(wide)
    if bound is None:
        return losses
    scale, smallest, largest, first = (_column(c, clean) for c in bound.unbind(1))
    fraction = 0.5 * (variance + 1.0)
    log_hat = fraction * largest + (1.0 - fraction) * smallest
    miss = scale * (output.detach() - eps)
    divergence = 0.5 * (
        (log_hat - smallest - 1.0 + torch.exp(smallest - log_hat))
        + miss.square() * torch.exp(-log_hat)
    )
    term = torch.where(first != 0, _level_cost(clean, miss, log_hat), divergence)
    return losses + term.flatten(1).mean(1) / math.log(2.0)


def diffusion_loss_gradient_reference(
    grad: Tensor,
    prediction: Tensor,
    x0: Tensor,
    positions: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    seed: int,
    stream: int,
    target: str,
    weight: Tensor | None = None,
    bound: Tensor | None = None,
) -> Tensor:
    """The gradient of `diffusion_loss` by its equations, where autograd cannot: `ETUDE_VERIFY`."""
    wide, channels = wide_dtype(prediction, x0), x0.shape[1]
    eps = normals(seed, stream, positions, tuple(x0.shape[1:])).to(wide)
    clean, output = x0.to(wide), prediction.to(wide)
    wanted = _target(target, clean, eps, alpha, sigma)
    mean = _column(grad, clean) / math.prod(x0.shape[1:])
    factor = 2.0 * mean if weight is None else 2.0 * mean * _column(weight, clean)
    made = torch.zeros_like(output)
    made[:, :channels] = factor * (output[:, :channels] - wanted)
    if bound is not None:
        scale, smallest, largest, first = (_column(c, clean) for c in bound.unbind(1))
        fraction = 0.5 * (output[:, channels:] + 1.0)
        log_hat = fraction * largest + (1.0 - fraction) * smallest
        miss = scale * (output[:, :channels] - eps)
        slope = 0.5 * (1.0 - torch.exp(smallest - log_hat) - miss.square() * torch.exp(-log_hat))
        slope = torch.where(first != 0, _level_slope(clean, miss, log_hat), slope)
        made[:, channels:] = mean / math.log(2.0) * 0.5 * (largest - smallest) * slope
    return made


def _target(target: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    if target == "v":
        return _column(alpha, x0) * eps - _column(sigma, x0) * x0
    return {"flow": eps - x0, "eps": eps, "x0": x0}[target]


def _level(x0: Tensor, miss: Tensor, log_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Upper and lower end of the 8-bit level around x0 in [-1, 1], and where it is open.

    In standard deviations from the mean; miss is x0 minus the mean. A level between two bounds is
    measured on the lower tail, and the highest from above, where differences of small numbers keep
    their digits.
    """
    lowest, highest = x0 < -0.999, x0 > 0.999
    centre = torch.where(highest, -miss, torch.where(lowest, miss, -miss.abs()))
    scale = torch.exp(-0.5 * log_hat)
    return (centre + 1.0 / 255.0) * scale, (centre - 1.0 / 255.0) * scale, lowest | highest


def _level_cost(x0: Tensor, miss: Tensor, log_hat: Tensor) -> Tensor:
    """Minus the log likelihood of the level around x0."""
    upper, lower, open_end = _level(x0, miss, log_hat)
    upper, lower = _normal_cdf(upper), _normal_cdf(lower)
    return -torch.where(open_end, upper, upper - lower).clamp(min=1e-12).log()


def _level_slope(x0: Tensor, miss: Tensor, log_hat: Tensor) -> Tensor:
    """The derivative of `_level_cost` by log_hat."""
    upper, lower, open_end = _level(x0, miss, log_hat)
    changes, areas = [], []
    for end in (upper, lower):
        area = _normal_cdf(end)
        slope = 2.0 * math.sqrt(2.0 / math.pi) * (1.0 + 0.134145 * end**2)
        changes.append(-0.5 * end * area * (1.0 - area) * slope)
        areas.append(area)
    inside = torch.where(open_end, areas[0], areas[0] - areas[1])
    change = torch.where(open_end, changes[0], changes[0] - changes[1])
    return torch.where(inside < 1e-12, torch.zeros_like(inside), -change / inside)


def _normal_cdf(x: Tensor) -> Tensor:
    """(1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, which the published losses use."""
    return torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))


# The C++ twin as torch operators.
_library = torch.library.Library("etude", "FRAGMENT")
_COMMON = (
    "Tensor prediction, Tensor x0, Tensor positions, Tensor alpha, Tensor sigma, "
    "Tensor? weight, Tensor? bound, int seed, int stream, int target"
)
_SCHEMAS = {
    "noise_like": "(Tensor x, Tensor positions, int seed, int stream) -> Tensor",
    "diffuse": "(Tensor x0, Tensor positions, Tensor alpha, Tensor sigma, int seed, int stream, "
    "ScalarType dtype) -> Tensor",
    "diffusion_loss": f"({_COMMON}) -> Tensor",
    "diffusion_loss_backward": f"(Tensor grad, {_COMMON}) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
ops = torch.ops.etude


def pixel_strides(t: Tensor) -> tuple[int, int] | None:
    """(channel, pixel) strides of (B, C, ...) if its pixels are evenly spaced, else None."""
    pixel, extent = 1, None
    for size, stride in zip(reversed(t.shape[2:]), reversed(t.stride()[2:]), strict=True):
        if size == 1:
            continue
        if extent is None:
            pixel, extent = stride, stride
        elif stride != extent:
            return None
        extent = extent * size
    return t.stride(1), pixel


def evenly(t: Tensor) -> Tensor:
    """t, or a copy of it, with evenly spaced pixels: NCHW, NHWC and their chunk() views pass."""
    return t if pixel_strides(t) else t.contiguous()


def empty_as(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, of t's shape: channels-last where t is, contiguous otherwise."""
    made = t.new_empty(t.shape, dtype=dtype or t.dtype)
    if t.dim() == 4 and not t.is_contiguous():
        if t.is_contiguous(memory_format=torch.channels_last):
            return made.contiguous(memory_format=torch.channels_last)
    return made


def _field(t: Tensor | None, channel: int = 0) -> tuple[int, int, int, int, int]:
    """A tensor from one of its channels on, as the C++ side takes it."""
    if t is None:
        return _ABSENT
    kind = backends.cpp().BFLOAT16 if t.dtype == torch.bfloat16 else backends.cpp().FLOAT32
    spacing = pixel_strides(t)
    address = t.data_ptr() + channel * t.stride(1) * t.element_size()
    return address, kind, t.stride(0), *spacing


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], x.shape[1], math.prod(x.shape[2:]), torch.get_num_threads()


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _noise_like_cpu(x: Tensor, positions: Tensor, seed: int, stream: int) -> Tensor:
    out = empty_as(x)
    if x.numel():
        positions = positions.contiguous()
        key = (positions.data_ptr(), seed, stream)
        backends.cpp().diffuse(_sizes(x), key, _ABSENT, _field(out), 0, 0)
    if backends.verifying():
        want = noise_like_reference(x, positions, seed=seed, stream=stream)
        backends.verify("noise_like C++", ("eps",), (out,), (want,))
    return out


def _diffuse_cpu(
    x0: Tensor,
    positions: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    seed: int,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    x0 = evenly(x0)
    out = empty_as(x0, dtype)
    if x0.numel():
        positions, alpha, sigma = (t.contiguous() for t in (positions, alpha, sigma))
        key = (positions.data_ptr(), seed, stream)
        scales = alpha.data_ptr(), sigma.data_ptr()
        backends.cpp().diffuse(_sizes(x0), key, _field(x0), _field(out), *scales)
    if backends.verifying():
        want = diffuse_reference(x0, positions, alpha, sigma, seed=seed, stream=stream, dtype=dtype)
        backends.verify("diffuse C++", ("x_t",), (out,), (want,))
    return out


def _loss_arguments(
    prediction: Tensor,
    x0: Tensor,
    positions: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    weight: Tensor | None,
    bound: Tensor | None,
    seed: int,
    stream: int,
    target: int,
) -> tuple:
    """What both passes hand to C++; the tensors must outlive the call."""
    return (
        _sizes(x0),
        (positions.data_ptr(), seed, stream),
        _field(prediction),
        _field(prediction, x0.shape[1]) if bound is not None else _ABSENT,
        _field(x0),
        alpha.data_ptr(),
        sigma.data_ptr(),
        _pointer(weight),
        _pointer(bound),
        target,
    )


def loss_inputs(
    prediction: Tensor, x0: Tensor, *rows: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Inputs of a twin with strides that it can walk."""
    return evenly(prediction), evenly(x0), [None if t is None else t.contiguous() for t in rows]


def _diffusion_loss_cpu(
    prediction: Tensor,
    x0: Tensor,
    positions: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    weight: Tensor | None,
    bound: Tensor | None,
    seed: int,
    stream: int,
    target: int,
) -> Tensor:
    prediction, x0, rows = loss_inputs(prediction, x0, positions, alpha, sigma, weight, bound)
    count, numel = x0.shape[0], math.prod(x0.shape[1:])
    loss = x0.new_empty(count, dtype=torch.float32)
    if x0.numel():
        chunks = -(-numel // backends.cpp().NOISE_CHUNK)
        partial = x0.new_empty((count, chunks), dtype=torch.float32)
        given = _loss_arguments(prediction, x0, *rows, seed, stream, target)
        backends.cpp().diffusion_loss(*given, partial.data_ptr(), loss.data_ptr())
    else:
        loss.fill_(float("nan"))  # the mean of nothing
    verify_loss("C++", loss, prediction, x0, *rows, seed, stream, target)
    return loss


def _diffusion_loss_backward_cpu(
    grad: Tensor,
    prediction: Tensor,
    x0: Tensor,
    positions: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    weight: Tensor | None,
    bound: Tensor | None,
    seed: int,
    stream: int,
    target: int,
) -> Tensor:
    prediction, x0, rows = loss_inputs(prediction, x0, positions, alpha, sigma, weight, bound)
    made = empty_as(prediction)
    channels = x0.shape[1]
    if bound is None and made.shape[1] > channels:
        made[:, channels:].zero_()
    if x0.numel():
        grad = grad.to(torch.float32).contiguous()
        given = _loss_arguments(prediction, x0, *rows, seed, stream, target)
        second = _field(made, channels) if bound is not None else _ABSENT
        backends.cpp().diffusion_loss_backward(*given, grad.data_ptr(), _field(made), second)
    verify_loss_gradient("C++", made, grad, prediction, x0, *rows, seed, stream, target)
    return made


def verify_loss(backend: str, loss: Tensor, *given) -> None:
    """Compare a twin's losses with the reference's where that is asked for."""
    if backends.verifying() and loss.numel():
        tensors, named = _by_name(given)
        want = diffusion_loss_reference(*tensors, **named)
        backends.verify(f"diffusion_loss {backend}", ("loss",), (loss,), (want,))


def verify_loss_gradient(backend: str, made: Tensor, *given) -> None:
    """Compare a twin's gradient with the reference's where that is asked for."""
    if backends.verifying() and made.numel():
        tensors, named = _by_name(given)
        want = diffusion_loss_gradient_reference(*tensors, **named)
        op, name = f"diffusion_loss {backend} backward", ("dprediction",)
        backends.verify(op, name, (made,), (want,))


def _by_name(given: tuple) -> tuple[tuple, dict]:
    """An operator's flat arguments as a reference takes them."""
    *tensors, weight, bound, seed, stream, target = given
    named = {"seed": seed, "stream": stream, "target": TARGETS[target]}
    return tuple(tensors), named | {"weight": weight, "bound": bound}


for _name, _kernel in {
    "noise_like": _noise_like_cpu,
    "diffuse": _diffuse_cpu,
    "diffusion_loss": _diffusion_loss_cpu,
    "diffusion_loss_backward": _diffusion_loss_backward_cpu,
}.items():
    _library.impl(_name, _kernel, "CPU")


@torch.library.register_fake("etude::noise_like", lib=_library)
def _(x, positions, seed, stream):
    return empty_as(x)


@torch.library.register_fake("etude::diffuse", lib=_library)
def _(x0, positions, alpha, sigma, seed, stream, dtype):
    return empty_as(evenly(x0), dtype)


@torch.library.register_fake("etude::diffusion_loss", lib=_library)
def _(prediction, x0, positions, alpha, sigma, weight, bound, seed, stream, target):
    return x0.new_empty(x0.shape[0], dtype=torch.float32)


@torch.library.register_fake("etude::diffusion_loss_backward", lib=_library)
def _(grad, prediction, x0, positions, alpha, sigma, weight, bound, seed, stream, target):
    return empty_as(evenly(prediction))


def register_gradients(prefix: str) -> None:
    """Give the operators named `etude::<prefix>...` their backward passes.

    Called here for the C++ operators and by `noising_triton` for the Triton ones.
    """

    def diffuse_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.dtype, ctx.dims = inputs[0].dtype, inputs[0].dim()

    def diffuse_backward(ctx, grad):
        (alpha,) = ctx.saved_tensors
        scaled = alpha.view(-1, *[1] * (ctx.dims - 1)) * grad.to(torch.float32)
        return scaled.to(ctx.dtype), *[None] * 6

    def loss_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.key = inputs[7:]

    def loss_backward(ctx, grad):
        op = getattr(ops, f"{prefix}diffusion_loss_backward")
        return op(grad, *ctx.saved_tensors, *ctx.key), *[None] * 9

    def refuse(ctx, grad):
        raise RuntimeError(
            "diffusion_loss can be differentiated once: for second derivatives set "
            "ETUDE_KERNELS=diffusion_loss=reference"
        )

    register = torch.library.register_autograd
    register(f"etude::{prefix}diffuse", diffuse_backward, setup_context=diffuse_context)
    register(f"etude::{prefix}diffusion_loss", loss_backward, setup_context=loss_context)
    register(f"etude::{prefix}diffusion_loss_backward", refuse)


register_gradients("")


def _check(op: str, x: Tensor, positions: Tensor, rows: dict[str, Tensor | None]) -> None:
    """Shapes, dtypes and devices; ValueError with one sentence."""
    name = "x" if op == "noise_like" else "x0"
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be floating point (B, C, ...), got {x.dtype} {tuple(x.shape)}"
        )
    if math.prod(x.shape[1:]) >= 2**31:
        raise ValueError(f"{op}: a sample of {tuple(x.shape[1:])} has 2^31 elements or more")
    count = x.shape[0]
    if tuple(positions.shape) != (count,) or positions.dtype != torch.int64:
        raise ValueError(
            f"{op}: positions must be int64 ({count},), got {positions.dtype}"
            f" {tuple(positions.shape)}"
        )
    for label, t in {"positions": positions, **rows}.items():
        if t is None:
            continue
        shape = (count, 4) if label == "bound" else (count,)
        if tuple(t.shape) != shape or t.device != x.device:
            raise ValueError(
                f"{op}: {label} must be {shape} on {x.device}, got {tuple(t.shape)} on {t.device}"
            )
        if t.requires_grad:
            raise ValueError(f"{op}: {label} gets no gradient: detach it")


def _triton() -> None:
    from . import noising_triton  # noqa: F401


def noise_like(x: Tensor, positions: Tensor, *, seed: int, stream: int) -> Tensor:
    """Standard normal noise of x's shape, dtype and memory format.

    Args:
        x: (B, C, ...), any floating dtype; only looked at for its form.
        positions: (B,) int64 on x's device; a sample's noise depends on its position alone.
        seed, stream: the Philox key; their lower 32 bits count.

    Errors: ValueError for shapes, dtypes or devices that do not fit; RuntimeError for a backend
    asked for by name that cannot run.
    """
    _check("noise_like", x, positions, {})
    backend = backends.pick("noise_like", x.device.type, x.dtype)
    if backend == "reference":
        return noise_like_reference(x, positions, seed=seed, stream=stream)
    if backend == "triton":
        _triton()
        return ops.triton_noise_like(x.detach(), positions, seed & MASK, stream & MASK)
    return ops.noise_like(x.detach(), positions, seed & MASK, stream & MASK)


def diffuse(
    x0: Tensor,
    positions: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    seed: int,
    stream: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x_t = alpha x0 + sigma eps, with eps drawn on the way. Returns (B, C, ...).

    Args:
        x0: (B, C, ...) float32, bfloat16, float16 or float64; NCHW and channels-last are walked as
            they are, other strides are copied.
        positions: (B,) int64.
        alpha, sigma: (B,), without gradient.
        dtype: of the result; None: x0's.

    A gradient flows to x0. Errors as in `noise_like`.
    """
    _check("diffuse", x0, positions, {"alpha": alpha, "sigma": sigma})
    to = dtype or x0.dtype
    backend = backends.pick("diffuse", x0.device.type, x0.dtype, to)
    if backend == "reference":
        return diffuse_reference(x0, positions, alpha, sigma, seed=seed, stream=stream, dtype=to)
    scales = alpha.to(torch.float32), sigma.to(torch.float32)
    if backend == "triton":
        _triton()
        return ops.triton_diffuse(x0, positions, *scales, seed & MASK, stream & MASK, to)
    return ops.diffuse(x0, positions, *scales, seed & MASK, stream & MASK, to)


def diffusion_loss(
    prediction: Tensor,
    x0: Tensor,
    positions: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    seed: int,
    stream: int,
    target: str,
    weight: Tensor | None = None,
    bound: Tensor | None = None,
) -> Tensor:
    """Loss of each sample, (B,) float32 (float64 for float64 inputs); see the module's equations.

    Args:
        prediction: (B, C, ...) or (B, 2 C, ...), any floating dtype; a second half is a variance,
            which without `bound` is ignored and gets a gradient of zero.
        x0: (B, C, ...) clean latents, without gradient.
        positions, alpha, sigma, seed, stream: as given to `diffuse`, which drew the same noise.
        target: one of "flow", "eps", "v", "x0".
        weight: (B,) factor of the squared error.
        bound: (B, 4) mean_scale, log_smallest, log_largest and whether (1 or 0) this is the first
            entry of the table; adds the variational bound in bits. For target "eps".

    Errors: as in `noise_like`; ValueError also for an unknown target or a bound without variances.
    """
    rows = {"alpha": alpha, "sigma": sigma, "weight": weight, "bound": bound}
    _check("diffusion_loss", x0, positions, rows)
    _check_loss(prediction, x0, target, bound)
    backend = backends.pick("diffusion_loss", x0.device.type, prediction.dtype, x0.dtype)
    if backend == "reference":
        return diffusion_loss_reference(
            prediction, x0, positions, alpha, sigma, seed=seed, stream=stream, target=target,
            weight=weight, bound=bound,
        )  # fmt: skip
    given = [None if t is None else t.to(torch.float32) for t in rows.values()]
    key = seed & MASK, stream & MASK, TARGETS.index(target)
    if backend == "triton":
        _triton()
        return ops.triton_diffusion_loss(prediction, x0, positions, *given, *key)
    return ops.diffusion_loss(prediction, x0, positions, *given, *key)


def _check_loss(prediction: Tensor, x0: Tensor, target: str, bound: Tensor | None) -> None:
    op, channels = "diffusion_loss", x0.shape[1]
    if target not in TARGETS:
        raise ValueError(f"{op}: target={target!r} is unknown: use {', '.join(TARGETS)}")
    halves = (channels, 2 * channels)
    fits = prediction.dim() == x0.dim() and prediction.shape[1] in halves
    if not fits or prediction.shape[2:] != x0.shape[2:] or len(prediction) != len(x0):
        raise ValueError(
            f"{op}: prediction must be {tuple(x0.shape)}, or have twice the channels, got "
            f"{tuple(prediction.shape)}"
        )
    if not prediction.is_floating_point() or prediction.device != x0.device:
        raise ValueError(
            f"{op}: prediction is {prediction.dtype} on {prediction.device}; x0 is {x0.dtype} on "
            f"{x0.device}"
        )
    if x0.requires_grad:
        raise ValueError(f"{op}: x0 gets no gradient: detach it")
    if bound is not None and (target != "eps" or prediction.shape[1] != 2 * channels):
        raise ValueError(
            f"{op}: bound needs target 'eps' and a prediction of {2 * channels} channels"
        )


_TWINS = ("cpp", "triton")
OPERATORS = (
    Operator("noise_like", "normals by Philox counters, a field per position", _TWINS),
    Operator("diffuse", "alpha x0 + sigma eps, the noise drawn on the way", _TWINS),
    Operator("diffusion_loss", "per-sample flow, eps, v or x0 loss, learned variance", _TWINS),
)
