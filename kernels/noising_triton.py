"""Triton twins of `noising.py`: the same operators for CUDA tensors, registered on first use.

One program takes 1,024 elements of one sample: 256 Philox counters, two per thread. The four
normals of a counter are joined side by side in the logical order, so that dense latents move in
16-byte accesses; where float32 and bfloat16 meet, 2 KB of shared memory bring the values to the
thread that stores them. The noise itself never leaves the registers. A chunk's sum goes to
partial[b, chunk]; a second kernel adds a sample's chunks in order. No atomics, and a fixed chunk: a
loss has the same bits in every run and in every batch.

The transcendental functions are written out. `tl.sin` and `tl.cos` reduce an angle of any size,
with a branch and a table in local memory for huge ones; here the quadrant is in the word's own
bits, and polynomials do the rest. They are those of C++, so the backends differ by roundings alone.

TRITON_INTERPRET=1 runs the kernels in Python on CPU tensors (tests; float32 and float16 only).
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import backends
from .compiling import Build
from .noising import (
    diffuse_reference,
    empty_as,
    evenly,
    loss_inputs,
    noise_like_reference,
    pixel_strides,
    register_gradients,
    verify_loss,
    verify_loss_gradient,
)


@dataclass(frozen=True)
class LaunchConfig:
    """How a sample is cut: `counters` Philox blocks of four elements per program."""

    counters: int = 256  # fixed: the order of summation must not depend on the batch
    warps: int = 4  # two counters per thread: 16 bytes of bfloat16, 2 x 16 of float32

    @property
    def elements(self) -> int:
        return 4 * self.counters


CONFIG = LaunchConfig()


@triton.jit
def log_of(x):
    """log of a normal positive float32: mantissa in [sqrt(1/2), sqrt(2)), then log(1 + f)."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    p = 0.07149833 * f - 0.11571308
    p = p * f + 0.11661531
    p = p * f - 0.12411038
    p = p * f + 0.14249933
    p = p * f - 0.1666848
    p = p * f + 0.20000708
    p = p * f - 0.2499999
    p = p * f + 0.3333333
    n = e.to(tl.float32)
    return n * 0.69140625 + (f + (n * 0.0017409306 + (f * f * (p * f) - 0.5 * (f * f))))


@triton.jit
def box_muller(first, second):
    """radius cos(angle), radius sin(angle) of two words."""
    u = ((first >> 8).to(tl.int32) + 1).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt_rn(-2.0 * log_of(u))
    turn = (second >> 8).to(tl.int32)
    angle = turn.to(tl.float32) * 3.745070282923929e-07  # 2 pi 2^-24
    quadrant = (turn + 2097152) >> 22
    q = quadrant.to(tl.float32)
    # pi / 2 in three parts: the first two products are exact.
    x = ((angle - q * 1.5703125) - q * 4.837512969970703e-04) - q * 7.549790126404332e-08
    z = x * x
    s = x + x * z * (-0.16666667 + z * (8.3333319e-3 + z * (-1.9840075e-4 + z * 2.7248402e-6)))
    c = 4.1666668e-2 + z * (-1.3888888e-3 + z * (2.4800591e-5 - z * 2.7299683e-7))
    c = (1.0 - 0.5 * z) + z * z * c
    swap = (quadrant & 1) != 0
    cosine = tl.where(swap, s, c)
    sine = tl.where(swap, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    return radius * cosine, radius * sine


@triton.jit
def draw(positions_ptr, b, seed, first, COUNTERS: tl.constexpr):
    """The noise of elements [4 first, 4 (first + COUNTERS)) of sample b, in logical order."""
    position = tl.load(positions_ptr + b)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    blocks = (first + tl.arange(0, COUNTERS)).to(tl.uint32)
    zero = blocks * 0
    w0, w1, w2, w3 = tl.philox(seed, low + zero, high + zero, blocks, zero)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    # join puts its operands last: [k, 0, 0], [k, 0, 1], ... are lanes 0, 1, 2, 3 of counter k.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [4 * COUNTERS])


@triton.jit
def offsets(i, S, channel_stride, pixel_stride, DENSE: tl.constexpr):
    """Where the logical elements i of a sample lie; the division is left out for dense latents."""
    if DENSE:
        return i
    else:
        return (i // S).to(tl.int64) * channel_stride + (i % S).to(tl.int64) * pixel_stride


@triton.jit
def target_scales(alpha_ptr, sigma_ptr, b, TARGET: tl.constexpr):
    """(p, q) of target = p eps + q x0."""
    p = 1.0
    q = 0.0
    if TARGET == 0:
        q = -1.0
    if TARGET == 2:
        p = tl.load(alpha_ptr + b)
        q = -tl.load(sigma_ptr + b)
    if TARGET == 3:
        p = 0.0
        q = 1.0
    return p, q


@triton.jit
def normal_cdf(x):
    """The logistic form of the tanh approximation, and its derivative."""
    y = 1.0 / (1.0 + tl.exp(-1.5957691216 * (x + 0.044715 * x * x * x)))
    return y, y * (1.0 - y) * 1.5957691216 * (1.0 + 0.134145 * x * x)


@triton.jit
def variance_term(bound_ptr, b, variance, x0, difference):
    """The bound's term of each element, in nats, and its slope by the network's fraction."""
    mean_scale = tl.load(bound_ptr + 4 * b)
    smallest = tl.load(bound_ptr + 4 * b + 1)
    largest = tl.load(bound_ptr + 4 * b + 2)
    first = tl.load(bound_ptr + 4 * b + 3)
    fraction = 0.5 * (variance + 1.0)
    log_hat = fraction * largest + (1.0 - fraction) * smallest
    miss = mean_scale * difference
    # One branch per program: every element of a sample belongs to one entry of the table.
    if first != 0.0:
        scale = tl.exp(-0.5 * log_hat)
        lowest = x0 < -0.999
        open_end = lowest | (x0 > 0.999)
        centre = tl.where(open_end, tl.where(lowest, miss, -miss), -tl.abs(miss))
        upper = (centre + 0.00392156862745098) * scale
        lower = (centre - 0.00392156862745098) * scale
        upper_cdf, upper_slope = normal_cdf(upper)
        lower_cdf, lower_slope = normal_cdf(lower)
        inside = tl.where(open_end, upper_cdf, upper_cdf - lower_cdf)
        change = -0.5 * (upper * upper_slope - tl.where(open_end, 0.0, lower * lower_slope))
        held = inside < 1e-12
        # log_of sees bits alone and would make a number of a NaN.
        term = tl.where(inside == inside, -log_of(tl.maximum(inside, 1e-12)), inside)
        slope = tl.where(held, 0.0, -change / inside)
    else:
        ratio = tl.exp(smallest - log_hat)
        squares = miss * miss * tl.exp(-log_hat)
        term = 0.5 * ((log_hat - smallest - 1.0 + ratio) + squares)
        slope = 0.5 * (1.0 - ratio - squares)
    return term, slope * 0.5 * (largest - smallest)


@triton.jit
def diffuse_kernel(
    x0_ptr, out_ptr, positions_ptr, alpha_ptr, sigma_ptr, seed, numel, S, chunks,
    x0_b, x0_c, x0_p, out_b, out_c, out_p,
    MIXED: tl.constexpr, DENSE: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """One chunk of one sample: alpha x0 + sigma eps where MIXED, else eps."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    first = (program % chunks).to(tl.int32) * COUNTERS
    value = draw(positions_ptr, b, seed, first, COUNTERS)
    i = 4 * first + tl.arange(0, 4 * COUNTERS)
    mask = i < numel
    if MIXED:
        at = x0_ptr + b * x0_b + offsets(i, S, x0_c, x0_p, DENSE)
        x0 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(alpha_ptr + b) * x0 + tl.load(sigma_ptr + b) * value
    to = out_ptr + b * out_b + offsets(i, S, out_c, out_p, DENSE)
    tl.store(to, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def missed(
    prediction_ptr, variance_ptr, x0_ptr, positions_ptr, alpha_ptr, sigma_ptr,
    seed, numel, S, chunks, prediction_b, prediction_c, prediction_p, x0_b, x0_c, x0_p,
    TARGET: tl.constexpr, BOUND: tl.constexpr, DENSE: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """prediction - target of one chunk of sample b, and what the bound needs beside it.

    Returns (b, elements, which of them exist, difference, second half, x0); the last two are the
    prediction where nothing reads them.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    first = (program % chunks).to(tl.int32) * COUNTERS
    i = 4 * first + tl.arange(0, 4 * COUNTERS)
    mask = i < numel
    # Loads go first: they are on their way while the counters are computed.
    at = b * prediction_b + offsets(i, S, prediction_c, prediction_p, DENSE)
    prediction = tl.load(prediction_ptr + at, mask=mask, other=0.0).to(tl.float32)
    variance = prediction
    x0 = prediction
    if BOUND:
        variance = tl.load(variance_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if TARGET != 1 or BOUND:
        from_x0 = x0_ptr + b * x0_b + offsets(i, S, x0_c, x0_p, DENSE)
        x0 = tl.load(from_x0, mask=mask, other=0.0).to(tl.float32)
    eps = draw(positions_ptr, b, seed, first, COUNTERS)
    p, q = target_scales(alpha_ptr, sigma_ptr, b, TARGET)
    difference = prediction - p * eps
    if TARGET != 1:
        difference -= q * x0
    return b, i, mask, difference, variance, x0


@triton.jit
def loss_kernel(
    prediction_ptr, variance_ptr, x0_ptr, positions_ptr, alpha_ptr, sigma_ptr, weight_ptr,
    bound_ptr, partial_ptr, seed, numel, S, chunks,
    prediction_b, prediction_c, prediction_p, x0_b, x0_c, x0_p,
    TARGET: tl.constexpr, WEIGHTED: tl.constexpr, BOUND: tl.constexpr, DENSE: tl.constexpr,
    COUNTERS: tl.constexpr,
):  # fmt: skip
    """The sum over one chunk of one sample; variance_ptr is the prediction's second half."""
    b, i, mask, difference, variance, x0 = missed(
        prediction_ptr, variance_ptr, x0_ptr, positions_ptr, alpha_ptr, sigma_ptr,
        seed, numel, S, chunks, prediction_b, prediction_c, prediction_p, x0_b, x0_c, x0_p,
        TARGET, BOUND, DENSE, COUNTERS,
    )  # fmt: skip
    cost = difference * difference
    if WEIGHTED:
        cost *= tl.load(weight_ptr + b)
    if BOUND:
        term, _ = variance_term(bound_ptr, b, variance, x0, difference)
        cost += term * 1.4426950408889634
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(mask, cost, 0.0), axis=0))


@triton.jit
def loss_sum_kernel(partial_ptr, loss_ptr, B, chunks, numel, SAMPLES: tl.constexpr):
    """Second stage: the chunks of SAMPLES samples, added in order."""
    b = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    mask = b < B
    total = tl.zeros([SAMPLES], dtype=tl.float32)
    for c in range(0, chunks):
        total += tl.load(partial_ptr + b * chunks + c, mask=mask, other=0.0)
    tl.store(loss_ptr + b, total / numel, mask=mask)


@triton.jit
def loss_backward_kernel(
    prediction_ptr, variance_ptr, x0_ptr, positions_ptr, alpha_ptr, sigma_ptr, weight_ptr,
    bound_ptr, grad_ptr, dprediction_ptr, dvariance_ptr, seed, numel, S, chunks,
    prediction_b, prediction_c, prediction_p, x0_b, x0_c, x0_p, out_b, out_c, out_p,
    TARGET: tl.constexpr, WEIGHTED: tl.constexpr, BOUND: tl.constexpr, ZERO: tl.constexpr,
    DENSE: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """The gradient of one chunk of one sample; the second half gets zeros where ZERO."""
    b, i, mask, difference, variance, x0 = missed(
        prediction_ptr, variance_ptr, x0_ptr, positions_ptr, alpha_ptr, sigma_ptr,
        seed, numel, S, chunks, prediction_b, prediction_c, prediction_p, x0_b, x0_c, x0_p,
        TARGET, BOUND, DENSE, COUNTERS,
    )  # fmt: skip
    mean = tl.load(grad_ptr + b) / numel
    factor = 2.0 * mean
    if WEIGHTED:
        factor *= tl.load(weight_ptr + b)
    to = b * out_b + offsets(i, S, out_c, out_p, DENSE)
    tl.store(
        dprediction_ptr + to, (factor * difference).to(dprediction_ptr.dtype.element_ty), mask=mask
    )
    if BOUND:
        _, slope = variance_term(bound_ptr, b, variance, x0, difference)
        slope *= mean * 1.4426950408889634
        tl.store(dvariance_ptr + to, slope.to(dvariance_ptr.dtype.element_ty), mask=mask)
    if ZERO:
        zeros = tl.zeros_like(difference).to(dvariance_ptr.dtype.element_ty)
        tl.store(dvariance_ptr + to, zeros, mask=mask)


def _key(seed: int, stream: int) -> int:
    """Both halves of the key as the int64 that `tl.philox` takes apart."""
    key = stream << 32 | seed
    return key - (1 << 64) if key >= 1 << 63 else key


def _grid(x: Tensor) -> tuple[int, int, int]:
    """(elements of a sample, pixels, chunks of a sample)."""
    numel = math.prod(x.shape[1:])
    return numel, math.prod(x.shape[2:]), triton.cdiv(numel, CONFIG.elements)


def _strides(t: Tensor) -> tuple[int, int, int]:
    return t.stride(0), *pixel_strides(t)


def _dense(S: int, *tensors: Tensor) -> bool:
    return all(pixel_strides(t) == (S, 1) for t in tensors)


def _halves(t: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The two halves of t's channels; the first one twice where there is only one."""
    second = t[:, channels:] if t.shape[1] > channels else t
    return t[:, :channels], second


def _launch_diffuse(
    x0: Tensor,
    positions: Tensor,
    alpha: Tensor | None,
    sigma: Tensor | None,
    seed: int,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    out = empty_as(x0, dtype)
    if x0.numel() == 0:
        return out
    mixed = alpha is not None
    positions = positions.contiguous()
    scales = (alpha.contiguous(), sigma.contiguous()) if mixed else (out, out)
    numel, S, chunks = _grid(x0)
    source = x0 if mixed else out
    wrap_triton(diffuse_kernel)[(x0.shape[0] * chunks,)](
        source, out, positions, *scales, _key(seed, stream), numel, S, chunks,
        *_strides(source), *_strides(out),
        MIXED=mixed, DENSE=_dense(S, source, out), COUNTERS=CONFIG.counters,
        num_warps=CONFIG.warps,
    )  # fmt: skip
    return out


@triton_op("etude::triton_noise_like", mutates_args={})
@backends.on_its_device
def _noise_like(x: Tensor, positions: Tensor, seed: int, stream: int) -> Tensor:
    out = _launch_diffuse(x, positions, None, None, seed, stream, x.dtype)
    if backends.verifying():
        want = noise_like_reference(x, positions, seed=seed, stream=stream)
        backends.verify("noise_like triton", ("eps",), (out,), (want,))
    return out


@triton_op("etude::triton_diffuse", mutates_args={})
@backends.on_its_device
def _diffuse(
    x0: Tensor,
    positions: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    seed: int,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    x0 = evenly(x0)
    out = _launch_diffuse(x0, positions, alpha, sigma, seed, stream, dtype)
    if backends.verifying():
        want = diffuse_reference(x0, positions, alpha, sigma, seed=seed, stream=stream, dtype=dtype)
        backends.verify("diffuse triton", ("x_t",), (out,), (want,))
    return out


@triton_op("etude::triton_diffusion_loss", mutates_args={})
@backends.on_its_device
def _diffusion_loss(
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
    positions, alpha, sigma, weight, bound = rows
    count = x0.shape[0]
    if x0.numel() == 0:
        return x0.new_full((count,), float("nan"), dtype=torch.float32)
    numel, S, chunks = _grid(x0)
    loss = x0.new_empty(count, dtype=torch.float32)
    partial = x0.new_empty((count, chunks), dtype=torch.float32)
    first, second = _halves(prediction, x0.shape[1])
    wrap_triton(loss_kernel)[(count * chunks,)](
        first, second, x0, positions, alpha, sigma,
        alpha if weight is None else weight, alpha if bound is None else bound, partial,
        _key(seed, stream), numel, S, chunks, *_strides(first), *_strides(x0),
        TARGET=target, WEIGHTED=weight is not None, BOUND=bound is not None,
        DENSE=_dense(S, first, x0), COUNTERS=CONFIG.counters, num_warps=CONFIG.warps,
    )  # fmt: skip
    wrap_triton(loss_sum_kernel)[(triton.cdiv(count, 128),)](
        partial, loss, count, chunks, numel, SAMPLES=128, num_warps=4
    )
    verify_loss("triton", loss, prediction, x0, *rows, seed, stream, target)
    return loss


@triton_op("etude::triton_diffusion_loss_backward", mutates_args={})
@backends.on_its_device
def _diffusion_loss_backward(
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
    positions, alpha, sigma, weight, bound = rows
    made = empty_as(prediction)
    if x0.numel() == 0:
        return made.zero_()
    grad = grad.to(torch.float32).contiguous()
    numel, S, chunks = _grid(x0)
    channels = x0.shape[1]
    first, second = _halves(prediction, channels)
    to_first, to_second = _halves(made, channels)
    wrap_triton(loss_backward_kernel)[(x0.shape[0] * chunks,)](
        first, second, x0, positions, alpha, sigma,
        alpha if weight is None else weight, alpha if bound is None else bound, grad,
        to_first, to_second, _key(seed, stream), numel, S, chunks,
        *_strides(first), *_strides(x0), *_strides(to_first),
        TARGET=target, WEIGHTED=weight is not None, BOUND=bound is not None,
        ZERO=bound is None and made.shape[1] > channels,
        DENSE=_dense(S, first, x0, to_first), COUNTERS=CONFIG.counters, num_warps=CONFIG.warps,
    )  # fmt: skip
    verify_loss_gradient("triton", made, grad, prediction, x0, *rows, seed, stream, target)
    return made


register_gradients("triton_")


def builds() -> list[Build]:
    """The launches for latents (4, 32, 32) of DiT-XL/2 at 256 pixels, for `compiling`."""
    plain = {"WEIGHTED": False, "BOUND": False, "DENSE": True, "COUNTERS": CONFIG.counters}
    learned = plain | {"TARGET": 1, "BOUND": True}
    listed = (
        ("noise", diffuse_kernel, {"MIXED": False}, "*bf16"),
        ("diffuse", diffuse_kernel, {"MIXED": True}, "*bf16"),
        ("diffuse channels-last", diffuse_kernel, {"MIXED": True, "DENSE": False}, "*bf16"),
        ("flow loss", loss_kernel, plain | {"TARGET": 0}, "*bf16"),
        ("flow loss backward", loss_backward_kernel, plain | {"TARGET": 0, "ZERO": False}, "*bf16"),
        ("learned variance loss", loss_kernel, learned, "*bf16"),
        (
            "learned variance loss backward",
            loss_backward_kernel,
            learned | {"ZERO": False},
            "*bf16",
        ),
        ("sum", loss_sum_kernel, {"SAMPLES": 128}, "*fp32"),
    )
    floats = ("alpha_ptr", "sigma_ptr", "weight_ptr", "bound_ptr", "grad_ptr", "partial_ptr")
    made = []
    for name, kernel, constants, kind in listed:
        if kernel is diffuse_kernel:
            constants = {"DENSE": True, "COUNTERS": CONFIG.counters} | constants
        free = [n for n in kernel.arg_names if n not in constants]
        types = {n: kind if n.endswith("_ptr") else "i32" for n in free}
        types |= {n: "*fp32" for n in free if n in floats}
        # The latents come from a cache in float32, the prediction from a bfloat16 network.
        types |= {n: "*fp32" for n in free if n in ("x0_ptr", "loss_ptr")}
        types |= {n: "*i64" for n in free if n == "positions_ptr"}
        types |= {n: "i64" for n in free if n == "seed"}
        loose = ("seed", "chunks", "B", "x0_p", "out_p", "prediction_p")
        aligned = tuple(n for n in free if not n.endswith("_ptr") and n not in loose)
        made.append(Build(name, kernel, types, constants, aligned, CONFIG.warps))
    return made
