"""Arrays of the host on a device, without waiting for it; called by what changes pictures there.

A copy from ordinary memory to a GPU makes the host wait for all that the GPU has still to do. From
page-locked memory it does not, so a training step hands over everything through here, in few large
arrays.
"""

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor of its dtype and shape on a device; on the CPU it may share memory."""
    made = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)
