"""Triton twins of `solver.py`: the same operators for CUDA tensors, registered on first use.

One program of the step takes 1,024 elements of one sample, eight per thread: up to five loads are
under way at once and nothing but x' and x0 is written. A sample's ten numbers come from device
memory, broadcast by the cache, so that a captured CUDA graph of a sampling loop stays valid when
they change. Predictions of all conditions are read where the network left them: the block of a
condition is B batch strides further, and the variances of a learned-sigma network are never
touched, because the channels of x end before them.

The picture kernel walks its output: stores are dense bytes, and the loads of a warp fall into C
short runs, one per plane.
"""

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import backends
from .compiling import Build
from .noising import empty_as, evenly, pixel_strides
from .noising_triton import offsets
from .solver import empty_bytes, register_gradients, row_stride, sizes, verify_bytes, verify_step


@dataclass(frozen=True)
class LaunchConfig:
    """Elements and warps of a program: 16 bytes of bfloat16 per thread, 2 x 16 of float32.

    Latents of 256 pictures are 1,024 programs, several per processor on any GPU; larger programs
    would leave processors idle at the batches that sampling uses.
    """

    block: int = 1024
    warps: int = 4


CONFIG = LaunchConfig()


@triton.jit
def solver_step_kernel(
    x_ptr, prediction_ptr, extra_ptr, next_ptr, x0_ptr, coefficients_ptr, guidance_ptr,
    B, numel, guided, S, chunks, coefficient_stride, guidance_stride,
    x_b, x_c, x_p, prediction_b, prediction_c, prediction_p, extra_b, extra_c, extra_p,
    out_b, out_c, out_p,
    SCALES: tl.constexpr, EXTRA: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one sample; elements from `guided` on keep the conditional prediction."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    i = (program % chunks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    x = tl.load(x_ptr + b * x_b + offsets(i, S, x_c, x_p, DENSE), mask=mask, other=0.0)
    at = prediction_ptr + offsets(i, S, prediction_c, prediction_p, DENSE)
    p = tl.load(at + b * prediction_b, mask=mask, other=0.0).to(tl.float32)
    if SCALES > 0:
        within = mask & (i < guided)
        control = tl.load(at + (b + B) * prediction_b, mask=within, other=0.0).to(tl.float32)
        weights = guidance_ptr + b * guidance_stride
        change = tl.load(weights) * (p - control)
        if SCALES > 1:
            none = tl.load(at + (b + 2 * B) * prediction_b, mask=within, other=0.0)
            none = none.to(tl.float32)
            change += tl.load(weights + 1) * (control - none)
        p += tl.where(within, change, 0.0)
    c = coefficients_ptr + b * coefficient_stride
    x0 = tl.load(c) * x + tl.load(c + 1) * p
    eps = tl.load(c + 2) * x + tl.load(c + 3) * p
    following = tl.load(c + 4) * x + (tl.load(c + 5) * x0 + tl.load(c + 6) * eps)
    if EXTRA:
        from_extra = extra_ptr + b * extra_b + offsets(i, S, extra_c, extra_p, DENSE)
        extra = tl.load(from_extra, mask=mask, other=0.0).to(tl.float32)
        following += tl.load(c + 7) * extra
    to = b * out_b + offsets(i, S, out_c, out_p, DENSE)
    tl.store(next_ptr + to, following, mask=mask)
    tl.store(x0_ptr + to, x0, mask=mask)


@triton.jit
def to_uint8_kernel(
    images_ptr, out_ptr, numel, chunks, image_b, image_c, image_p,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK bytes of one picture, in (pixel, channel) order."""
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    i = (program % chunks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    at = images_ptr + b * image_b
    at += (i % C).to(tl.int64) * image_c + (i // C).to(tl.int64) * image_p
    value = (tl.load(at, mask=mask, other=0.0).to(tl.float32) + 1.0) * 127.5
    # A NaN fails both comparisons and becomes 0.
    value = tl.where(value > 0.0, tl.where(value < 255.0, value, 255.0), 0.0)
    # Adding 1.5 * 2^23 rounds to the nearest integer, halves to the even one.
    level = ((value + 12582912.0) - 12582912.0).to(tl.int32)
    tl.store(out_ptr + b * numel + i, level.to(tl.uint8), mask=mask)


def _strides(t: Tensor) -> tuple[int, int, int]:
    return t.stride(0), *pixel_strides(t)


@triton_op("etude::triton_solver_step", mutates_args={})
@backends.on_its_device
def _solver_step(
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
    if x.numel() == 0:
        return following, x0
    coefficients = coefficients.contiguous()
    guidance = None if guidance is None else guidance.contiguous()
    B, C, S = sizes(x)
    chunks = triton.cdiv(C * S, CONFIG.block)
    # Absent tensors are passed as x; the constexpr flags keep the kernel away from them.
    other = x if extra is None else extra
    weights = x if guidance is None else guidance
    fields = (x, prediction, other, following)
    wrap_triton(solver_step_kernel)[(B * chunks,)](
        x, prediction, other, following, x0, coefficients, weights,
        B, C * S, guided_channels * S, S, chunks,
        row_stride(coefficients), 0 if guidance is None else row_stride(guidance),
        *(s for t in fields for s in _strides(t)),
        SCALES=0 if guidance is None else guidance.shape[-1], EXTRA=extra is not None,
        DENSE=all(pixel_strides(t) == (S, 1) for t in fields), BLOCK=CONFIG.block,
        num_warps=CONFIG.warps,
    )  # fmt: skip
    verify_step(
        "triton", (following, x0), x, prediction, coefficients, guidance, guided_channels, extra
    )
    return following, x0


@triton_op("etude::triton_to_uint8", mutates_args={})
@backends.on_its_device
def _to_uint8(images: Tensor) -> Tensor:
    images = evenly(images)
    out = empty_bytes(images)
    if images.numel() == 0:
        return out
    numel = math.prod(images.shape[1:])
    chunks = triton.cdiv(numel, CONFIG.block)
    wrap_triton(to_uint8_kernel)[(images.shape[0] * chunks,)](
        images, out, numel, chunks, *_strides(images), C=images.shape[1], BLOCK=CONFIG.block,
        num_warps=CONFIG.warps,
    )  # fmt: skip
    verify_bytes("triton", out, images)
    return out


register_gradients("triton_")


def builds() -> list[Build]:
    """Launches for latents (4, 32, 32) and pictures (3, 256, 256), for `compiling`."""
    step = {"SCALES": 1, "EXTRA": False, "DENSE": True, "BLOCK": CONFIG.block}
    listed = (
        ("step", solver_step_kernel, step | {"SCALES": 0}),
        ("guided step", solver_step_kernel, step),
        ("guided step, two scales, 2M", solver_step_kernel, step | {"SCALES": 2, "EXTRA": True}),
        ("guided step channels-last", solver_step_kernel, step | {"DENSE": False}),
        ("bytes", to_uint8_kernel, {"C": 3, "BLOCK": CONFIG.block}),
    )
    loose = ("B", "chunks", "coefficient_stride", "guidance_stride", "guided")
    made = []
    for name, kernel, constants in listed:
        free = [n for n in kernel.arg_names if n not in constants]
        types = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in free}
        types |= {n: "*bf16" for n in free if n in ("prediction_ptr", "images_ptr")}
        types |= {n: "*u8" for n in free if kernel is to_uint8_kernel and n == "out_ptr"}
        aligned = tuple(n for n in free if not n.endswith(("_ptr", "_p")) and n not in loose)
        made.append(Build(name, kernel, types, constants, aligned, CONFIG.warps))
    return made
