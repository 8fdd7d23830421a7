"""CUDA twins of `adaln.py`: kernels of `csrc/cuda/adaln*`, registered on first use.

What they have over the Triton twins: a row of 1152 columns fits a warp's lanes exactly (36 each),
the sums of a row need no barrier, and the sums over rows stay in registers. What they lack:
widths that are no multiple of 8 or above 4096, and dtypes other than one for all, or float32 x and
out with bfloat16 h and y. `fits` tells; other calls take the Triton twin or the reference.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import backends
from .adaln import new_gradients, new_outputs, register_twin, verify_backward, verify_forward
from .cuda_calls import dtype_code, place

_MAX_WIDTH = 4096
_PAIRS = {
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
}
_SHARED = 160 * 1024  # bytes that a block may have on sm_80, sm_90 and sm_100, but not on sm_86
_ABSENT = (0, 0, 0, 0)
_SMS = 132  # of an H100 or H200: sums are cut alike on every GPU, so that their bits are the same


@dataclass(frozen=True)
class LaunchConfig:
    """Rows of one sample that a block takes, forward and backward."""

    forward_rows: int
    backward_rows: int

    @classmethod
    def for_shape(cls, B: int, N: int) -> "LaunchConfig":
        """A heuristic, not a measurement: the least time by a count of rows.

        Blocks run in waves of as many as the multiprocessors hold (five forward, two backward,
        where a block takes half the registers). A wave lasts as long as its blocks' rows, plus
        what a block does once: it stages the modulation (two rows' worth) and, backward, adds its
        warps and writes partial sums (eight).
        """

        def best(at_once: int, once: int, choices: tuple[int, ...]) -> int:
            def cost(rows: int) -> tuple[int, int]:
                waves = -(-B * -(-N // rows) // at_once)
                return waves * (min(rows, N) + once), rows

            return min(choices, key=cost)

        return cls(
            best(5 * _SMS, 2, (8, 16, 32, 64)),
            best(2 * _SMS, 8, (8, 16, 32, 64, 128, 256)),
        )


@lru_cache
def _large_enough(index: int) -> bool:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin >= _SHARED


def fits(x: Tensor, h: Tensor | None, out_dtype: torch.dtype | None, norm: bool) -> bool:
    """Whether there is a kernel for this call (for the backend chosen by name or by default)."""
    D, y = x.shape[2], out_dtype or x.dtype
    branch = h.dtype if h is not None else y
    if D % 8 or D > _MAX_WIDTH or (x.dtype, branch) not in _PAIRS or (norm and y != branch):
        return False
    return x.device.type != "cuda" or _large_enough(x.device.index)


def _aligned(t: Tensor | None) -> Tensor | None:
    """t where its rows can be read 16 bytes at a time, else a copy."""
    if t is None:
        return None
    steps = [s * t.element_size() for s in t.stride()[:-1]]
    if t.stride(-1) == 1 and not any(s % 16 for s in (t.data_ptr(), *steps)):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _rows(t: Tensor | None) -> tuple[int, int, int, int]:
    if t is None:
        return _ABSENT
    strides = {1: (0, 0), 2: (t.stride(0), 0), 3: t.stride()[:2]}[t.dim()]
    return t.data_ptr(), dtype_code(t.dtype), *strides


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _forward(
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
    made = out, y, mean, rstd = new_outputs(x, gate, scale, out_dtype)
    B, N, D = x.shape
    if x.numel():
        # Copies are kept in a list until the launch has been given to the stream.
        tensors = [*(_aligned(t) for t in (x, h, gate, shift, scale, bias)), out, y]
        backends.cuda().adaln_forward(
            (B, N, D),
            [_rows(t) for t in tensors],
            [_address(mean), _address(rstd)],
            eps,
            rms,
            LaunchConfig.for_shape(B, N).forward_rows,
            place(x),
        )
    elif mean is not None:
        mean.zero_(), rstd.zero_()
    if backends.verifying():
        verify_forward((out, y), x, h, gate, shift, scale, bias, eps, rms, out_dtype)
    return made


def _backward(
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
    lead = x if x is not None else h
    if lead.numel() == 0:
        return tuple(None if t is None else t.zero_() for t in made)
    B, N, D = lead.shape
    rows = LaunchConfig.for_shape(B, N).backward_rows
    partial = lead.new_empty((B, -(-N // rows), 4, D), dtype=torch.float32)
    vectors = list(dmod.unbind(1))
    vectors = [None] * (gate is None) + vectors + [None, None] * (scale is None)
    given = [_aligned(t) for t in (dout, dy, x, h, gate, scale, bias)]
    outputs = [dx, dh, *vectors, None if bias is None else dbias]
    backends.cuda().adaln_backward(
        (B, N, D),
        [_rows(t) for t in (*given, *outputs)],
        [_address(mean), _address(rstd), partial.data_ptr()],
        rms,
        rows,
        place(lead),
    )
    if backends.verifying():
        verify_backward(op, made, dout, dy, x, h, gate, scale, bias, eps, rms)
    return made


register_twin("cuda_", "CUDA", _forward, _backward)
