"""What every call into the CUDA extension passes: dtypes by number, device and stream.

Called by the `<family>_cuda.py` files.
"""

import torch
from torch import Tensor

from . import backends

_NAMES = {
    torch.float32: "FLOAT32",
    torch.bfloat16: "BFLOAT16",
    torch.float16: "FLOAT16",
    torch.float64: "FLOAT64",
}


def dtype_code(dtype: torch.dtype) -> int:
    """The number by which the extension knows a dtype."""
    return getattr(backends.cuda(), _NAMES[dtype])


def place(t: Tensor) -> tuple[int, int]:
    """(device, stream) of a launch for t: torch's current stream there. CPU tensors: tests."""
    if t.device.type != "cuda":
        return 0, 0
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream
