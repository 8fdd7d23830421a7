"""Noise by position, noising and diffusion losses on the latents of a training step."""

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs, Run, with_gradients
from etude import kernels

SOURCES = (
    "kernels/noising.py",
    "kernels/noising_triton.py",
    "kernels/philox.py",
    "csrc/cpu/noising.cpp",
    "csrc/cpu/walk.h",
)
CPU = {"demo": (128, 4, 16, 16), "256 pixels": (256, 4, 32, 32)}
GPU = {"256 pixels": (256, 4, 32, 32), "512 pixels": (256, 4, 64, 64), "SD3": (64, 16, 128, 128)}
KEY = {"seed": 1, "stream": 8}


def make(double: bool) -> object:
    """Inputs for a prediction of C or, with variances, 2 C channels; latents stay float32."""

    def made(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
        g = torch.Generator().manual_seed(0)
        count = shape[0]
        t = torch.rand(count, generator=g) * 0.8 + 0.1
        wide = (count, shape[1] * (1 + double), *shape[2:])
        numbers = {
            "x0": torch.randn(shape, generator=g),
            "positions": torch.arange(count) * 1_234_567,
            "alpha": 1 - t,
            "sigma": t,
            "upstream": torch.full((count,), 1 / count),
            "bound": torch.stack((t * 0.05, -10 + t, -6 + t, torch.zeros(count)), 1),
        }
        inputs = {name: value.to(device) for name, value in numbers.items()}
        if dtype == torch.float64:
            inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        prediction = torch.randn(wide, generator=g).to(device, dtype)
        return inputs | {"prediction": prediction.requires_grad_()}

    return made


def drawn(inputs: Inputs) -> list[Tensor]:
    return [inputs[k] for k in ("x0", "positions", "alpha", "sigma")]


def noise(inputs: Inputs) -> Tensor:
    return kernels.noise_like(inputs["x0"], inputs["positions"], **KEY)


def noising(inputs: Inputs) -> Tensor:
    return kernels.diffuse(*drawn(inputs), **KEY)


def loss(target: str) -> Run:
    def run(inputs: Inputs) -> Tensor:
        bound = inputs["bound"] if inputs["prediction"].shape[1] > inputs["x0"].shape[1] else None
        given = inputs["prediction"], *drawn(inputs)
        return kernels.diffusion_loss(*given, **KEY, target=target, bound=bound)

    return run


def moved(reads: int, predictions: int) -> object:
    """Latents and predictions, each read or written once; noise in memory is nobody's need."""

    def count(inputs: Inputs) -> int:
        prediction = inputs["prediction"]
        size = reads * inputs["x0"].numel() * inputs["x0"].element_size()
        return size + predictions * prediction.numel() * prediction.element_size()

    return count


def case(target: str, variant: str, double: bool) -> Case:
    run = with_gradients(loss(target), ("prediction",), ("upstream",))
    return Case(
        "diffusion_loss", variant, make(double), run, CPU, GPU, moved(2, 3), sources=SOURCES
    )


CASES = (
    Case(
        "noise_like", "forward", make(False), noise, CPU, GPU, moved(1, 0), dtypes=("float32",),
        sources=SOURCES,
    ),
    Case(
        "diffuse", "forward", make(False), noising, CPU, GPU, moved(2, 0), dtypes=("float32",),
        sources=SOURCES,
    ),
    case("flow", "forward+backward flow", False),
    case("eps", "forward+backward learned variance", True),
)  # fmt: skip
