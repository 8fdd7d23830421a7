"""A guided step of a sampler over the latents of a batch of pictures, and pictures as bytes."""

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs
from etude import kernels
from etude.kernels.solver import solver_coefficients

SOURCES = (
    "kernels/solver.py",
    "kernels/solver_triton.py",
    "csrc/cpu/solver.cpp",
    "csrc/cpu/walk.h",
)
CPU = {"demo": (128, 4, 16, 16), "256 pixels": (256, 4, 32, 32)}
GPU = {"256 pixels": (64, 4, 32, 32), "512 pixels": (64, 4, 64, 64), "SD3": (16, 16, 128, 128)}
PICTURES = {"64 pixels": (64, 3, 64, 64)}
GPU_PICTURES = {"256 pixels": (64, 3, 256, 256), "1024 pixels": (16, 3, 1024, 1024)}


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    """x in float32 and a learned-sigma network's output in `dtype`, as a sampler has them."""
    g = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    points = (torch.tensor(c, dtype=torch.float64) for c in (0.6, 0.8, 0.8, 0.6))
    blocks = (2 * shape[0], 2 * shape[1], *shape[2:])
    return {
        "x": torch.randn(shape, generator=g).to(device, wide),
        "prediction": torch.randn(blocks, generator=g).to(device, dtype),
        "coefficients": solver_coefficients("ddim", "eps", *points).to(device, wide),
        "guidance": torch.tensor([1.5]).to(device, wide),
    }


def step(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return kernels.solver_step(**inputs, guided_channels=3)


def diffusers_lines(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The usual lines of a pipeline: chunk, extrapolate, estimate, step."""
    x, channels = inputs["x"], inputs["x"].shape[1]
    output = inputs["prediction"].to(x.dtype)[:, :channels]
    conditional, unconditional = output.chunk(2)
    guided = conditional + 1.5 * (conditional - unconditional)
    p = torch.cat((guided[:, :3], conditional[:, 3:]), dim=1)
    x0 = (x - 0.8 * p) / 0.6
    return 0.8 * x0 + 0.6 * p, x0


def moved(inputs: Inputs) -> int:
    """x is read, x' and x0 are written; of each prediction half the channels are read."""
    x, prediction = inputs["x"], inputs["prediction"]
    half = prediction.numel() * prediction.element_size() // 2
    return 3 * x.numel() * x.element_size() + half


def pictures(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    g = torch.Generator().manual_seed(0)
    # In 16 bits, so that every dtype holds the same pictures.
    return {"images": (torch.randn(shape, generator=g) * 0.6).bfloat16().to(device, dtype)}


def bytes_of(inputs: Inputs) -> Tensor:
    return kernels.to_uint8(inputs["images"])


def bytes_moved(inputs: Inputs) -> int:
    images = inputs["images"]
    return images.numel() * (images.element_size() + 1)


CASES = (
    Case(
        "solver_step", "guided DDIM", make, step, CPU, GPU, moved, sources=SOURCES,
        rivals={"usual lines": lambda: diffusers_lines},
    ),
    Case(
        "to_uint8", "forward", pictures, bytes_of, PICTURES, GPU_PICTURES, bytes_moved,
        sources=SOURCES,
    ),
)  # fmt: skip
