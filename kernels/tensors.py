"""What operators of every family ask of a tensor: its dtype of arithmetic, its strides, a new one.

Called by the families' files and their Triton twins.
"""

import torch
from torch import Tensor


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that a reference computes in: float64 where a tensor has it, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def dense(t: Tensor | None) -> Tensor | None:
    """t with a contiguous last dimension; the other strides are free."""
    if t is None or t.stride(-1) == 1 or t.shape[-1] == 1:
        return t
    return t.contiguous()


def new_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous, uninitialised tensor of t's shape (empty_like would keep t's strides)."""
    return t.new_empty(t.shape, dtype=dtype or t.dtype)
