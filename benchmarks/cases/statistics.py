"""Mean and scatter matrix of features, beside a product of a float64 copy."""

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs, Run
from etude import kernels

SOURCES = (
    "kernels/statistics.py",
    "kernels/statistics_triton.py",
    "kernels/statistics_cuda.py",
    "csrc/cpu/statistics.cpp",
    "csrc/cuda/statistics.cu",
)


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    g = torch.Generator().manual_seed(0)
    return {"x": (torch.randn(*shape, generator=g) * 2 + 3).to(device, dtype)}


def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return kernels.moments(inputs["x"])


def product() -> Run:
    """The usual way: widen, centre, multiply."""

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        wide = inputs["x"].double()
        mean = wide.mean(0)
        centred = wide - mean
        return mean, centred.T @ centred

    return run


def moved(inputs: Inputs) -> int:
    x = inputs["x"]
    return x.numel() * x.element_size() + 8 * x.shape[1] * (x.shape[1] + 1)


def flops(inputs: Inputs) -> int:
    """One triangle: a multiplication and an addition per row and entry."""
    rows, width = inputs["x"].shape
    return rows * width * (width + 1)


CASES = (
    Case(
        "moments",
        "features",
        make,
        run,
        {"4096 x 1024": (4096, 1024), "8192 x 384": (8192, 384)},
        {"50000 x 2048": (50_000, 2048)},
        moved,
        flops,
        dtypes=("float32",),
        sources=SOURCES,
        rivals={"float64 copy and product": product},
    ),
)
