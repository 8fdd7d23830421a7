"""How the C library keeps what was freed; called by the command line, never by the library.

By itself glibc gives every tensor above 32 MiB back to the system when it is freed, and the top of
its heap too; the next tensor then begins with a page fault for every 4 KiB, 2,000 a picture in an
Inception forward in float32. A job allocates the same sizes again and again, so that a process of
its own keeps them.
"""

import ctypes
import os
import sys

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_KEPT = 1 << 30  # bytes: larger blocks still go back
_MOST_BEFORE = 1 << 25  # what glibc before 2.35 takes


def keep_freed() -> bool:
    """Let glibc keep freed blocks for the next ones, below 1 GiB where it can; whether it does.

    Whoever has set glibc's own variables is left alone; elsewhere than on glibc it does nothing.
    """
    said = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if not sys.platform.startswith("linux") or any(name in os.environ for name in said):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # First the threshold: the other call fixes it at 128 KiB where this one was refused.
    took = mallopt(_MMAP, _KEPT) or mallopt(_MMAP, _MOST_BEFORE)
    return bool(took and mallopt(_TRIM, _KEPT))
