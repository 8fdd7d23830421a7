"""GroupNorm with SiLU in 32 groups, channels last, at the levels of a U-Net and of a VAE."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Inputs, Run, with_gradients
from benchmarks.libraries import liger_groupnorm
from etude import kernels

SOURCES = (
    "kernels/groupnorm.py",
    "kernels/groupnorm_triton.py",
    "csrc/cpu/groupnorm.cpp",
    "csrc/cpu/vectormath.h",
)
CPU = {"320 at 32x32": (2, 320, 32, 32), "128 at 64x64": (2, 128, 64, 64)}
GPU = {
    "U-Net 1280 at 8x8": (32, 1280, 8, 8),
    "U-Net 640 at 32x32": (32, 640, 32, 32),
    "U-Net 320 at 64x64": (32, 320, 64, 64),
    "VAE 128 at 256x256": (8, 128, 256, 256),
}
BACKWARD = "forward+backward"


def make_in(layout: torch.memory_format):
    def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
        g = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g).to(device, dtype)

        x, dy = (normal(*shape).contiguous(memory_format=layout) for _ in range(2))
        made = {"x": x, "weight": normal(shape[1]), "bias": normal(shape[1])}
        return {name: t.requires_grad_() for name, t in made.items()} | {"dy": dy}

    return make


def ours(inputs: Inputs) -> Tensor:
    return kernels.groupnorm_silu(inputs["x"], 32, inputs["weight"], inputs["bias"])


def peer(inputs: Inputs) -> Tensor:
    return F.silu(F.group_norm(inputs["x"], 32, inputs["weight"], inputs["bias"]))


def liger() -> Run:
    norm = liger_groupnorm(32)
    return lambda inputs: F.silu(norm(inputs["x"], inputs["weight"], inputs["bias"]))


def case(variant: str, layout: torch.memory_format, gpu: dict, tensors: int) -> Case:
    def finished(forward: Run) -> Run:
        backward = variant.startswith(BACKWARD)
        return with_gradients(forward, ("x", "weight", "bias"), ("dy",)) if backward else forward

    def moved(inputs: Inputs) -> int:
        return tensors * inputs["x"].numel() * inputs["x"].element_size()

    rivals = {
        "torch": lambda: finished(peer),
        "Liger GroupNorm, torch SiLU": lambda: finished(liger()),
    }
    return Case(
        "groupnorm_silu",
        variant,
        make_in(layout),
        finished(ours),
        CPU,
        gpu,
        moved,
        sources=SOURCES,
        rivals=rivals,
    )


LAST, FIRST = torch.channels_last, torch.contiguous_format
CASES = (
    case("forward", LAST, GPU, 2),
    case(BACKWARD, LAST, GPU, 5),
    case("forward NCHW", FIRST, {}, 2),
    case(f"{BACKWARD} NCHW", FIRST, {}, 5),
)
