"""How the C library keeps what was freed; called by the command line, never by the library.

By itself glibc gives the top of its heap back to the system whenever tensors there are freed, and
the next ones begin with a page fault for every 4 KiB, 2,000 a picture in an Inception forward in
float32. A job allocates the same sizes again and again, so that a process of its own keeps some.
"""

import ctypes
import os
import sys

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_TOP = 1 << 28  # bytes that stay at the top of the heap
_BLOCK = 1 << 25  # bytes from which a block is mapped by itself, as glibc has it at most


def keep_freed() -> bool:
    """Let glibc keep up to 256 MiB at the top of the heap for the next tensors; whether it does.

    Larger blocks than 32 MiB go back when they are freed, as without it. Whoever has set glibc's
    own variables is left alone; elsewhere than on glibc it does nothing.
    """
    said = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if not sys.platform.startswith("linux") or any(name in os.environ for name in said):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Both or none: either alone fixes the other, which glibc would adapt, at 128 KiB.
    return bool(mallopt(_MMAP, _BLOCK) and mallopt(_TRIM, _TOP))
