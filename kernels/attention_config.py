"""Which attention kernel runs, and with which tiles: chosen from shapes and the GPU, not measured.

Called by attention_triton.py.
"""

from dataclasses import dataclass

# Longest sequences of the short form; 0 sends everything to the long one (tests do).
SHORT_KEYS = 256
SHORT_QUERIES = 256
# Programs that fill the largest GPU of today twice over; from here on more would gain nothing.
ENOUGH = 264


# Rows of a gradient that are turned into the gradient before norm and rotation at a time.
CHUNK = 32


def _power(n: int, least: int, most: int) -> int:
    """The power of two at or above n, within limits."""
    size = least
    while size < n and size < most:
        size *= 2
    return size


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles and warps of one kernel. Heuristics from counted bytes and registers, not timings.

    width: D0 + D1. major: 8, 9 or 10, the GPU's compute capability.
    """

    rows: int  # queries of a tile
    keys: int  # keys of a tile
    warps: int
    stages: int

    @classmethod
    def short_forward(
        cls, Nk: int, width: int, itemsize: int, major: int, prepares: bool, bias: bool
    ) -> "LaunchConfig | None":
        """None where a block's scores or a head's keys and values do not fit.

        64 queries for 4 warps: at 256 keys 128 registers of scores per thread, and two programs per
        multiprocessor, of which one computes while the other waits for its keys. 512 keys of 64
        spill on sm_90, with 4 warps and with 8 (`compiling` says so). Norm and rotation
        of 256 keys of 80 need the registers of 8 warps. On sm_80 the operands of the products live
        in registers too, and half the keys fit; likewise beside a tile of bias.
        """
        if itemsize == 4:
            fits = Nk <= min(32, SHORT_KEYS) and width <= 128
            return cls(16, _power(Nk, 16, 32), 4, 1) if fits else None
        most = 128 if major < 9 or width > 80 or bias else 256
        if Nk > min(most, SHORT_KEYS) or width > 128:
            return None
        return cls(64, _power(Nk, 16, 256), 8 if prepares and width > 64 else 4, 2)

    @classmethod
    def short_backward(
        cls, Nq: int, Nk: int, width: int, itemsize: int, major: int, bias: bool
    ) -> "LaunchConfig | None":
        """One program per head, on Hopper: only wgmma reads q, k, v and dout from shared memory
        and leaves the registers to dq. A tile of bias finds no room beside it. Beyond 1024 keys the
        long form has more programs."""
        if itemsize == 4:
            fits = Nq <= min(32, SHORT_QUERIES) and Nk <= 1024 and width <= 128
            return cls(_power(Nq, 16, 32), 16, 4, 1) if fits else None
        if major != 9 or Nq > min(256, SHORT_QUERIES) or Nk > 1024 or width > 80 or bias:
            return None
        rows = _power(Nq, 64, 256)
        return cls(rows, 64, 4 if rows == 64 else 8, 2)

    @classmethod
    def long_forward(cls, width: int, itemsize: int, major: int) -> "LaunchConfig":
        if itemsize == 4:
            return cls(32, 32, 4, 1) if width <= 128 else cls(16, 16, 4, 1)
        return cls(128, 64, 8, 2) if width <= 128 else cls(64, 32, 4, 2)

    @classmethod
    def long_dq(cls, width: int, itemsize: int, major: int) -> "LaunchConfig":
        if itemsize == 4:
            return cls(32 if width <= 128 else 16, 16, 4, 1)
        if major == 8 and 64 < width <= 128:
            return cls(128, 32, 8, 2)
        return cls.long_forward(width, itemsize, major)

    @classmethod
    def long_dkv(cls, width: int, itemsize: int, major: int) -> "LaunchConfig":
        """128 keys, where registers allow: half as many reads of q and dout as 64 need."""
        if itemsize == 4:
            return cls(16, 16, 4, 1)
        if width > 128 or major != 9 and width > 64:
            return cls(64 if 80 < width <= 128 else 32, 64, 8, 2)
        return cls(64 if major >= 9 and width <= 80 else 32, 128, 8, 2)
