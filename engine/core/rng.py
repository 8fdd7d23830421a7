"""Randomness as a function of (seed, stream, position); called by data, training and sampling.

Bits come from Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
with key (seed, stream) and counter (position mod 2^32, position div 2^32, block, 0). Nothing is
drawn from a hidden state, so the value of a position never depends on rank, world size, worker,
micro batch, decoder or resume. Integer bits are identical in numpy, torch and every kernel; normals
come from one Box-Muller form and agree within 2e-6 between backends (`etude.kernels.philox`).
"""

from enum import IntEnum

import numpy as np
import torch

from etude.kernels.philox import MASK, normals, philox_rounds


class Stream(IntEnum):
    """What a number is drawn for; streams are independent of each other. Values are fixed."""

    ORDER = 1  # permutation of a pass over the data
    SUBSTITUTE = 2  # which sample replaces an unreadable one
    CROP = 3
    FLIP = 4
    VARIANT = 5  # which cached augmentation of a picture
    POSTERIOR = 6  # the autoencoder's latent sample
    TIMESTEP = 7
    NOISE = 8
    DROP_SEMANTIC = 9
    DROP_CONTROL = 10
    POOL = 11  # index into a growing pool
    SAMPLE_NOISE = 12  # the initial noise of a generated picture
    SAMPLE_STEP = 13  # the noise added by a stochastic sampler
    SAMPLE_LABEL = 14
    MIX = 15  # mixup and cutmix
    SPLIT = 16
    SUBSET = 17  # subsampling in statistics
    INITIAL = 18  # weight initialisation
    TEXT_NOISE = 19  # noise on the copies that pad a text
    MASK = 20  # which tokens a masked pass keeps
    MASK_RATIO = 21  # the share of tokens that a step's masked pass leaves out
    SECOND_NOISE = 22  # the noise of a second pass over the same latents
    REAL_OR_DRAWN = 30  # whether a learner sees a real picture
    RANDAUGMENT = 23  # which operations change a learner's picture, and their signs
    ERASE = 24  # the rectangle that is erased from a learner's picture
    DROPOUT = 25  # what a learner's network of the user's own draws in a step
    PRUNE = 28  # ties and random choices among candidate pictures
    PRUNE_CLASS = 29  # which classes keep one picture more where a count does not divide
    DIRECTION = 34  # directions that features are projected on
    PART = 35  # which rows make a part that a figure is averaged or fitted over
    PROBE = 36  # vectors that matrix factorisations are checked with
    VOTE = 37  # the rounds of a blind vote
    DRAW_OF_INTERVAL = 40  # values that a figure with an interval could have had
    SPREAD = 41  # which pictures or prompts of a set are taken first
    HALF = 31  # which pictures are in a half of a set


def bits(seed: int, stream: int, positions: np.ndarray, count: int) -> np.ndarray:
    """Random 32-bit words, (B, count) uint32, for positions (B,) int64."""
    position = np.asarray(positions, dtype=np.int64).astype(np.uint64)[:, None]
    blocks = np.arange(-(-count // 4), dtype=np.uint64)[None, :]
    shape = np.broadcast_shapes(position.shape, blocks.shape)
    counter = (
        np.broadcast_to(position & np.uint64(MASK), shape),
        np.broadcast_to(position >> np.uint64(32), shape),
        np.broadcast_to(blocks, shape),
        np.zeros(shape, dtype=np.uint64),
    )
    words = philox_rounds((seed & MASK, int(stream) & MASK), counter)
    return np.stack(words, axis=-1).reshape(len(position), -1)[:, :count].astype(np.uint32)


def uniform(seed: int, stream: int, positions: np.ndarray, count: int = 1) -> np.ndarray:
    """Uniform numbers in [0, 1) with 24 random bits, (B, count) float64, exact in float32."""
    return (bits(seed, stream, positions, count) >> 8) * 2.0**-24


def integers(seed: int, stream: int, positions: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Integers in [0, bound), (B,) int64; `bound` is a number or (B,), at most 2^32.

    The upper half of a 64-bit word times the bound (Lemire 2019): the bias is below 2^-32.
    """
    high, low = bits(seed, stream, positions, 2).astype(np.uint64).T
    bound = np.asarray(bound, dtype=np.uint64)
    return (high * bound + (low * bound >> np.uint64(32)) >> np.uint64(32)).astype(np.int64)


def normal(
    seed: int,
    stream: int,
    positions: np.ndarray | torch.Tensor,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Standard normal numbers, (B, *shape) float32, one independent field per position.

    Element i of a position's flattened field is lane i mod 4 of Philox block i div 4; lanes (0, 1)
    and (2, 3) are the cosine and sine of one Box-Muller pair each. The largest magnitude is 5.77.
    """
    where = torch.as_tensor(positions, dtype=torch.int64, device=device)
    return normals(int(seed), int(stream), where, tuple(shape))


def permute(index: np.ndarray, size: int, seed: int, stream: int, turn: int) -> np.ndarray:
    """Entry `index` of a pseudo-random permutation of range(size): O(1) per entry, no table.

    A balanced Feistel network with Philox round functions over the smallest even number of bits
    that holds `size`, walked until the value falls inside (Black and Rogaway 2002).

    Args:
        index: (B,) int64 in [0, size).
        turn: which permutation, for example the number of the pass over the data.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = np.asarray(index, dtype=np.int64).copy()
    pending = np.ones(len(value), dtype=bool)
    while pending.any():
        left, right = value[pending] >> half, value[pending] & mask
        for step in range(6):
            word = bits(seed, stream, right + (turn << 32), step + 1)[:, step].astype(np.int64)
            left, right = right, left ^ (word & mask)
        value[pending] = (left << half) | right
        pending &= value >= size
    return value
