"""All layers' modulation in one product, against the layers one by one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Case, Inputs, Run
from etude import kernels

SOURCES = ("kernels/modulation.py",)
# Batch, hidden size, layers of six vectors each.
CPU = {"DiT-S": (32, 384, 12), "DiT-B": (8, 768, 12)}
GPU = {"DiT-B": (64, 768, 12), "DiT-XL": (64, 1152, 28)}
_made: dict[str, object] = {}


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    batch, width, count = shape
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(device, dtype)

    rows = 6 * width * count
    made = {"s": normal(batch, width), "weight": normal(rows, width) * width**-0.5}
    made |= {"bias": normal(rows), "dout": normal(batch, rows)}
    made["s"].requires_grad_()
    return made


def layers(inputs: Inputs, flat: bool) -> list[nn.Linear]:
    """Layers whose weights are views of the one tensor, or copies; made once per inputs."""
    weight, bias = inputs["weight"], inputs["bias"]
    if _made.get("of") is weight and _made["flat"] == flat:
        return _made["layers"]
    width = weight.shape[1]
    listed = []
    for w, b in zip(weight.split(6 * width), bias.split(6 * width), strict=True):
        layer = nn.Linear(width, 6 * width, device="meta")
        layer.weight = nn.Parameter(w if flat else w.clone())
        layer.bias = nn.Parameter(b if flat else b.clone())
        listed.append(layer)
    _made.update(of=weight, flat=flat, layers=listed)
    return listed


def step(forward: Run, flat: bool) -> Run:
    """Forward, and the gradients of s and of every weight and bias."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        maps = layers(inputs, flat)
        out = forward(inputs["s"], maps)
        leaves = [inputs["s"], *(m.weight for m in maps), *(m.bias for m in maps)]
        return out, *torch.autograd.grad(out, leaves, inputs["dout"])

    return run


def one_by_one(s: Tensor, maps: list[nn.Linear]) -> Tensor:
    return torch.cat([F.linear(s, m.weight, m.bias) for m in maps], 1)


def moved(inputs: Inputs) -> int:
    """The weights read twice and their gradient written once; the rest is small beside them."""
    return 3 * inputs["weight"].numel() * inputs["weight"].element_size()


def flops(inputs: Inputs) -> int:
    return 3 * 2 * inputs["s"].shape[0] * inputs["weight"].numel()


def case(variant: str, flat: bool) -> Case:
    rival = step(one_by_one, flat)
    return Case(
        "modulation_gemm", f"forward+backward {variant}", make, step(kernels.modulation_gemm, flat),
        CPU, GPU, moved, flops, sources=SOURCES, rivals={"one by one": lambda: rival},
        compiled=False,
    )  # fmt: skip


CASES = (case("flat", True), case("apart", False))
