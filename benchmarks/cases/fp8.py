"""Normalised, modulated rows in 8 bits, and the linear layer that takes them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Inputs
from etude import kernels

SOURCES = ("kernels/fp8.py", "kernels/fp8_triton.py", "kernels/adaln_triton.py")
CPU = {"DiT-B": (2, 256, 768)}
GPU = {"DiT-B": (64, 256, 768), "DiT-XL": (64, 256, 1152)}


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    batch, rows, width = shape
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(device, dtype)

    made = {"x": normal(batch, rows, width), "mod": normal(batch, 2 * width)}
    return made | {"weight": normal(3 * width, width) * width**-0.5, "bias": normal(3 * width)}


def rows8(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The dequantised rows: 8-bit values of two providers may differ by a step where they tie."""
    return kernels.adaln_modulate_fp8(inputs["x"], modulation=inputs["mod"])[1]


def qkv(inputs: Inputs) -> Tensor:
    rows = kernels.adaln_modulate_fp8(inputs["x"], modulation=inputs["mod"])
    return kernels.linear_fp8(rows, inputs["weight"], inputs["bias"], out_dtype=inputs["x"].dtype)


def unrounded(inputs: Inputs) -> Tensor:
    y = kernels.adaln_modulate(inputs["x"], modulation=inputs["mod"])
    return F.linear(y, inputs["weight"], inputs["bias"])


def bytes_of_rows(inputs: Inputs) -> int:
    x = inputs["x"]
    return x.numel() * (x.element_size() + 1)


def bytes_of_qkv(inputs: Inputs) -> int:
    x, weight = inputs["x"], inputs["weight"]
    return bytes_of_rows(inputs) + (4 * x.numel() + weight.numel()) * x.element_size()


def flops(inputs: Inputs) -> int:
    return 2 * inputs["x"].numel() * inputs["weight"].shape[0]


CASES = (
    Case("adaln_modulate_fp8", "forward", make, rows8, CPU, GPU, bytes_of_rows, sources=SOURCES),
    Case("linear_fp8", "forward with adaLN", make, qkv, CPU, GPU, bytes_of_qkv, flops,
         sources=SOURCES, rivals={"bfloat16": lambda: unrounded}, dtypes=("bfloat16",),
         compiled=False),
)  # fmt: skip
