"""Philox-4x32-10 and its Box-Muller: the numbers behind every draw; called by `noising.py` and by
the engine's `core/rng.py`.

Random123's Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with key
(seed, stream) and counter (position mod 2^32, position div 2^32, block, 0), where block is an
element's logical index in its position's field, divided by 4. Each counter gives four words
w0..w3, and each pair (a, b) of (w0, w1), (w2, w3) two normals:

    u = ((a >> 8) + 1) 2^-24        angle = (b >> 8) 2 pi 2^-24        (both float32)
    radius = sqrt(-2 log u)         radius cos(angle), radius sin(angle)

The words and the pairs (u, angle) have the same bits in numpy, torch, C++ and Triton. The three
transcendental functions are torch's here; the kernels use polynomials of their own, so normals
agree within 2e-6. The largest magnitude is 5.77.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import backends

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox_rounds(key: tuple[int, int], counter: tuple[Any, ...]) -> tuple[Any, ...]:
    """Ten Philox-4x32 rounds.

    Args:
        key: two integers below 2^32.
        counter: four equal-shaped arrays of uint32 values, all numpy uint64 or all torch int64.

    Returns:
        Four arrays of the same kind with values in [0, 2^32).
    """
    key_0, key_1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1  # wraps modulo 2^64
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & MASK) ^ c1 ^ key_0,
            product_1 & MASK,
            ((product_0 >> 32) & MASK) ^ c3 ^ key_1,
            product_0 & MASK,
        )
        key_0, key_1 = (key_0 + _WEYL_0) & MASK, (key_1 + _WEYL_1) & MASK
    return c0, c1, c2, c3


def uniform_pairs_reference(
    seed: int, stream: int, positions: Tensor, blocks: int
) -> tuple[Tensor, Tensor]:
    """u and angle of every pair, both (B, blocks, 2) float32; positions: (B,) int64."""
    position = positions[:, None]
    block = torch.arange(blocks, dtype=torch.int64, device=positions.device)[None, :]
    zero = torch.zeros_like(position + block)
    counter = (zero + (position & MASK), zero + ((position >> 32) & MASK), zero + block, zero)
    w0, w1, w2, w3 = philox_rounds((seed & MASK, stream & MASK), counter)
    first = torch.stack((w0, w2), dim=-1) >> 8
    second = torch.stack((w1, w3), dim=-1) >> 8
    u = (first + 1).to(torch.float32) * 2.0**-24
    return u, second.to(torch.float32) * (2.0 * math.pi * 2.0**-24)


def uniform_pairs(seed: int, stream: int, positions: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """`uniform_pairs_reference`, by the C++ twin for CPU tensors: the same bits."""
    if backends.pick("uniform_pairs", positions.device.type, twins=("cpp",)) == "reference":
        return uniform_pairs_reference(seed, stream, positions, blocks)
    positions = positions.contiguous()
    u = torch.empty((len(positions), blocks, 2), dtype=torch.float32)
    angle = torch.empty_like(u)
    if u.numel():
        backends.cpp().uniform_pairs(
            positions.data_ptr(),
            len(positions),
            blocks,
            seed & MASK,
            stream & MASK,
            u.data_ptr(),
            angle.data_ptr(),
            torch.get_num_threads(),
        )
    return u, angle


def normals(seed: int, stream: int, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, (B, *shape) float32; element i is lane i mod 4 of block i div 4.

    Args:
        positions: (B,) int64, on the device of the result.
    """
    size = math.prod(shape)
    u, angle = uniform_pairs(seed, stream, positions, -(-size // 4))
    radius = torch.sqrt(-2.0 * torch.log(u))
    lanes = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return lanes.flatten(1)[:, :size].reshape(len(positions), *shape)
