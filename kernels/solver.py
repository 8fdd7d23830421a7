"""One step of a sampler in one pass over the latents, and pictures as bytes.

Called by the engine's samplers. Three things happen to a network's output between two of its calls;
separately they read and write the latents a dozen times. For x (B, C, ...) and predictions of the
network under K = 1, 2 or 3 conditions, stacked on the batch:

    guidance   p = full + w (full - none)                                     K = 2, [full, none]
               p = full + w_0 (full - control) + w_1 (control - none)         K = 3
    estimates  x0 = c_0 x + c_1 p             eps = c_2 x + c_3 p
    update     x' = c_4 x + c_5 x0 + c_6 eps + c_7 extra

Guidance is classifier-free (Ho and Salimans 2022), in the convention in which a weight of 0 is the
conditional prediction; with three conditions the semantic and the control part have weights of
their own (as Brooks et al. 2023 do for text and picture). It may be restricted to the first
channels, as published for DiT. `solver_coefficients` writes the eight numbers for a network that
predicts eps, v, a flow or x0, at x = alpha x_0 + sigma eps, and one of these rules for the way to
(alpha', sigma'):

    ddim      x' = alpha' x0 + sigma' eps         (Song et al. 2021; Euler where the schedule is
                                                  flow, and in sigma / alpha for any other); with
              eta, noise of eta times ddpm's spread takes its share of sigma', and extra is noise
    dpmpp_2m  x' = sigma' / sigma x + (alpha' - alpha sigma' / sigma) D
              D = (1 + 1 / 2r) x0 - 1 / 2r extra,     r = (lambda - lambda_previous)
              / (lambda' - lambda), lambda = log(alpha / sigma), extra the previous step's x0
              (Lu et al. 2022, "DPM-Solver++", algorithm 2)
    ddpm      a draw of q(x' | x, x0) with the posterior's variance; extra is its noise

The coefficients are float32 numbers on the device, one row for all samples or one per sample: a
whole loop reads its rows from one table, has no argument that changes on the host, and can be one
CUDA graph. Arithmetic is float32 (float64 for float64 x).
"""

import math

import torch
from torch import Tensor

from . import backends
from .catalogue import Operator
from .noising import empty_as, evenly, pixel_strides

METHODS = ("ddim", "dpmpp_2m", "ddpm")
PREDICTIONS = ("flow", "eps", "v", "x0")
_ABSENT = (0, 0, 0, 0, 0)


def solver_coefficients(
    method: str,
    prediction: str,
    alpha: Tensor,
    sigma: Tensor,
    alpha_next: Tensor,
    sigma_next: Tensor,
    *,
    alpha_previous: Tensor | None = None,
    sigma_previous: Tensor | None = None,
    eta: float = 0.0,
) -> Tensor:
    """The rows (..., 8) float64 of `solver_step` for a way between points of a schedule.

    Args:
        method: "ddim", "dpmpp_2m" or "ddpm".
        prediction: what the network returns: "flow", "eps", "v" or "x0".
        alpha, sigma, ..., sigma_next: (...); alpha_next 1 and sigma_next 0 end at x0.
        alpha_previous, sigma_previous: (...) the point before, for dpmpp_2m; None: first order.
        eta: share of ddpm's noise in a ddim step; for 1 the two are one.

    Errors: ValueError for an unknown method or prediction.
    """
    if method not in METHODS or prediction not in PREDICTIONS:
        raise ValueError(
            f"solver_coefficients: method={method!r}, prediction={prediction!r} are unknown: use "
            f"{', '.join(METHODS)} and {', '.join(PREDICTIONS)}"
        )
    given = (alpha, sigma, alpha_next, sigma_next)
    a, s, b, r = torch.broadcast_tensors(*(torch.as_tensor(t).double() for t in given))
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    if prediction == "eps":
        estimates = (1 / a, -s / a, zero, one)
    elif prediction == "x0":
        estimates = (zero, one, 1 / s, -a / s)
    elif prediction == "flow":
        total = a + s
        estimates = (1 / total, -s / total, 1 / total, a / total)
    else:
        power = a**2 + s**2
        estimates = (a / power, -s / power, s / power, a / power)
    ratio = a / b
    spread = s**2 - ratio**2 * r**2
    deviation = spread.clamp(min=0).sqrt() * r / s
    if method == "ddim" and eta == 0.0:
        update = (zero, b, r, zero)
    elif method == "ddim":
        drawn = eta * deviation
        update = (zero, b, (r**2 - drawn**2).clamp(min=0).sqrt(), drawn)
    elif method == "ddpm":
        update = (ratio * (r / s) ** 2, b * spread / s**2, zero, deviation)
    else:
        gain = b - a * r / s
        slope = zero
        if alpha_previous is not None:
            before = torch.as_tensor(alpha_previous).double().log()
            before = before - torch.as_tensor(sigma_previous).double().log()
            now, then = a.log() - s.log(), b.log() - r.log()
            slope = 0.5 * (then - now) / (now - before)
            # The way to the clean point is infinitely long: it is taken by the first-order rule.
            slope = torch.where(r > 0, slope, zero)
        update = (r / s, gain * (1 + slope), zero, -gain * slope)
    return torch.stack((*estimates, *update), dim=-1)


def solver_step_reference(
    x: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    *,
    guidance: Tensor | None = None,
    guided_channels: int | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`solver_step` in plain torch, differentiated by autograd."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    count, channels = x.shape[:2]
    p = prediction[:, :channels].to(wide)
    if guidance is not None:
        weights = guidance.to(wide).expand(count, guidance.shape[-1]).unbind(1)
        weights = [w.reshape(-1, *[1] * (x.dim() - 1)) for w in weights]
        parts = p.split(count) if count else (p,) * (len(weights) + 1)
        guided = parts[0]
        for weight, first, second in zip(weights, parts[:-1], parts[1:], strict=True):
            guided = guided + weight * (first - second)
        limit = channels if guided_channels is None else min(guided_channels, channels)
        p = torch.cat((guided[:, :limit], parts[0][:, limit:]), dim=1)
    c = coefficients.to(wide).expand(count, 8).unbind(1)
    c = [k.reshape(-1, *[1] * (x.dim() - 1)) for k in c]
    x = x.to(wide)
    x0, eps = c[0] * x + c[1] * p, c[2] * x + c[3] * p
    following = c[4] * x + (c[5] * x0 + c[6] * eps)
    if extra is not None:
        following = following + c[7] * extra.to(wide)
    return following, x0


def to_uint8_reference(images: Tensor) -> Tensor:
    """`to_uint8` in plain torch."""
    levels = ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.movedim(1, -1).contiguous()


# The C++ twin as torch operators.
_library = torch.library.Library("etude", "FRAGMENT")
_library.define(
    "solver_step(Tensor x, Tensor prediction, Tensor coefficients, Tensor? guidance, "
    "int guided_channels, Tensor? extra) -> (Tensor, Tensor)"
)
_library.define("to_uint8(Tensor images) -> Tensor")
ops = torch.ops.etude


def _field(t: Tensor | None) -> tuple[int, int, int, int, int]:
    """A tensor as the C++ side takes it."""
    if t is None:
        return _ABSENT
    kind = backends.cpp().BFLOAT16 if t.dtype == torch.bfloat16 else backends.cpp().FLOAT32
    return t.data_ptr(), kind, t.stride(0), *pixel_strides(t)


def sizes(x: Tensor) -> tuple[int, int, int]:
    """B, C and the number of pixels."""
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def row_stride(t: Tensor) -> int:
    """Elements from one sample's row to the next: 0 for a row that all of them share."""
    return t.stride(0) if t.dim() == 2 and t.shape[0] > 1 else 0


def _solver_step_cpu(
    x: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    guidance: Tensor | None,
    guided_channels: int,
    extra: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x, prediction = evenly(x), evenly(prediction)
    extra = None if extra is None else evenly(extra)
    following, x0 = empty_as(x), empty_as(x)
    if x.numel():
        coefficients = coefficients.contiguous()
        scales = (0, 0, 0, 0)
        if guidance is not None:
            guidance = guidance.contiguous()
            scales = (guidance.data_ptr(), row_stride(guidance), guidance.shape[-1])
            scales = (*scales, guided_channels)
        backends.cpp().solver_step(
            sizes(x),
            *(_field(t) for t in (x, prediction, extra, following, x0)),
            coefficients.data_ptr(),
            row_stride(coefficients),
            scales,
            torch.get_num_threads(),
        )
    verify_step(
        "C++", (following, x0), x, prediction, coefficients, guidance, guided_channels, extra
    )
    return following, x0


def verify_step(
    backend: str,
    made: tuple[Tensor, Tensor],
    x: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    guidance: Tensor | None,
    guided_channels: int,
    extra: Tensor | None,
) -> None:
    """Compare a twin's step with the reference's where that is asked for."""
    if backends.verifying():
        want = solver_step_reference(
            x, prediction, coefficients, guidance=guidance, guided_channels=guided_channels,
            extra=extra,
        )  # fmt: skip
        backends.verify(f"solver_step {backend}", ("x", "x0"), made, want)


def empty_bytes(images: Tensor) -> Tensor:
    """(B, ..., C) uint8 for images (B, C, ...)."""
    shape = (images.shape[0], *images.shape[2:], images.shape[1])
    return images.new_empty(shape, dtype=torch.uint8)


def _to_uint8_cpu(images: Tensor) -> Tensor:
    images = evenly(images)
    out = empty_bytes(images)
    if images.numel():
        given = sizes(images), _field(images), out.data_ptr(), torch.get_num_threads()
        backends.cpp().to_uint8(*given)
    verify_bytes("C++", out, images)
    return out


def verify_bytes(backend: str, out: Tensor, images: Tensor) -> None:
    """Compare a twin's bytes with the reference's where that is asked for."""
    if backends.verifying():
        made, want = out.float(), to_uint8_reference(images).float()
        backends.verify(f"to_uint8 {backend}", ("bytes",), (made,), (want,))


_library.impl("solver_step", _solver_step_cpu, "CPU")
_library.impl("to_uint8", _to_uint8_cpu, "CPU")


@torch.library.register_fake("etude::solver_step", lib=_library)
def _(x, prediction, coefficients, guidance, guided_channels, extra):
    x = evenly(x)
    return empty_as(x), empty_as(x)


@torch.library.register_fake("etude::to_uint8", lib=_library)
def _(images):
    return empty_bytes(images)


def register_gradients(prefix: str) -> None:
    """Make a derivative of the twins an error; the public functions never ask for one."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            "solver_step has no backward pass: for gradients set "
            "ETUDE_KERNELS=solver_step=reference"
        )

    torch.library.register_autograd(f"etude::{prefix}solver_step", refuse)


register_gradients("")


def _triton() -> None:
    from . import solver_triton  # noqa: F401


def _check(
    x: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    guidance: Tensor | None,
    guided_channels: int | None,
    extra: Tensor | None,
) -> None:
    """Shapes, dtypes and devices; ValueError with one sentence."""
    op = "solver_step"
    if x.dim() < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: x must be float32 or float64 (B, C, ...), got {x.dtype} {tuple(x.shape)}"
        )
    if math.prod(x.shape[1:]) >= 2**31:
        raise ValueError(f"{op}: a sample of {tuple(x.shape[1:])} has 2^31 elements or more")
    count = x.shape[0]
    if guidance is not None:
        if guidance.dim() not in (1, 2) or guidance.shape[-1] not in (1, 2):
            raise ValueError(f"{op}: guidance must end in 1 or 2 scales: {tuple(guidance.shape)}")
        if guidance.dim() == 2 and guidance.shape[0] not in (1, count):
            raise ValueError(f"{op}: guidance has {guidance.shape[0]} rows for {count} samples")
    elif guided_channels is not None:
        raise ValueError(f"{op}: guided_channels has no effect without guidance")
    blocks = 1 if guidance is None else 1 + guidance.shape[-1]
    fits = prediction.dim() == x.dim() and prediction.shape[2:] == x.shape[2:]
    if not fits or len(prediction) != blocks * count or prediction.shape[1] < x.shape[1]:
        raise ValueError(
            f"{op}: prediction must be {(blocks * count, *x.shape[1:])}, or have more channels, "
            f"got {tuple(prediction.shape)}"
        )
    if tuple(coefficients.shape) not in ((8,), (1, 8), (count, 8)):
        raise ValueError(
            f"{op}: coefficients must be (8,) or ({count}, 8), got {tuple(coefficients.shape)}"
        )
    if extra is not None and extra.shape != x.shape:
        raise ValueError(f"{op}: extra must be {tuple(x.shape)}, got {tuple(extra.shape)}")
    rest = {"prediction": prediction, "coefficients": coefficients, "guidance": guidance}
    for name, t in {**rest, "extra": extra}.items():
        if t is not None and (t.device != x.device or not t.is_floating_point()):
            raise ValueError(
                f"{op}: {name} is {t.dtype} on {t.device}; x is {x.dtype} on {x.device}"
            )


def solver_step(
    x: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    *,
    guidance: Tensor | None = None,
    guided_channels: int | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', x0), both of x's shape and dtype; see the module's equations.

    Args:
        x: (B, C, ...) float32, or float64 for the reference's arithmetic.
        prediction: (K B, C' >= C, ...), any floating dtype; channels beyond C are skipped in place.
        coefficients: (8,) or (B, 8), of `solver_coefficients`, on x's device.
        guidance: (K - 1,) or (B, K - 1) weights on x's device, 1 or 2; None: K is 1.
        guided_channels: how many of the first channels are guided; None: all.
        extra: (B, C, ...) the previous x0 (dpmpp_2m) or noise (ddpm, ddim with eta).

    Where a gradient is asked for, the reference computes it. Errors: ValueError for shapes, dtypes
    or devices that do not fit; RuntimeError for a backend asked for by name that cannot run.
    """
    _check(x, prediction, coefficients, guidance, guided_channels, extra)
    given = [t for t in (x, prediction, extra) if t is not None]
    tensors = [t for t in (coefficients, guidance) if t is not None]
    backend = backends.pick("solver_step", x.device.type, *(t.dtype for t in given))
    if torch.is_grad_enabled() and any(t.requires_grad for t in given + tensors):
        backend = "reference"
    if backend == "reference":
        return solver_step_reference(
            x, prediction, coefficients, guidance=guidance, guided_channels=guided_channels,
            extra=extra,
        )  # fmt: skip
    rows = [None if t is None else t.to(torch.float32) for t in (coefficients, guidance)]
    limit = x.shape[1] if guided_channels is None else min(guided_channels, x.shape[1])
    if backend == "triton":
        _triton()
        return ops.triton_solver_step(x, prediction, *rows, limit, extra)
    return ops.solver_step(x, prediction, *rows, limit, extra)


def to_uint8(images: Tensor) -> Tensor:
    """Pictures (B, C, ...) in [-1, 1] to (B, ..., C) uint8, clamped, halves to the even level.

    Args:
        images: (B, C, ...), any floating dtype; NaN becomes 0.

    Errors: ValueError for anything else; RuntimeError as in `solver_step`.
    """
    if images.dim() < 2 or not images.is_floating_point():
        raise ValueError(
            f"to_uint8: images must be floating point (B, C, ...), got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    images = images.detach()
    backend = backends.pick("to_uint8", images.device.type, images.dtype)
    if backend == "reference":
        return to_uint8_reference(images)
    if backend == "triton":
        _triton()
        return ops.triton_to_uint8(images)
    return ops.to_uint8(images)


_TWINS = ("cpp", "triton")
OPERATORS = (
    Operator("solver_step", "guidance, clean estimate and DDIM, 2M or DDPM update", _TWINS),
    Operator("to_uint8", "pictures in [-1, 1] to bytes, channels last", _TWINS),
)
