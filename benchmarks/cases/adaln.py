"""Adaptive LayerNorm and gated residuals, with a modulation whose chunks are strided views."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Inputs, Run, with_gradients
from benchmarks.libraries import LAYERNORMS, Unary
from etude import kernels

SOURCES = ("kernels/adaln.py", "kernels/adaln_triton.py", "csrc/cpu/adaln.cpp")
CPU = {"demo": (256, 16, 144), "DiT-XL": (8, 256, 1152)}
BACKWARD = "forward+backward"
GPU = {"DiT-B": (64, 256, 768), "DiT-XL": (64, 256, 1152), "DiT-XL B=256": (256, 256, 1152)}


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    batch, rows, width = shape
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(device, dtype)

    made = {name: normal(batch, rows, width) for name in ("x", "h", "dout", "dy")}
    made["mod"], made["bias"] = normal(batch, 3 * width), normal(width)
    for name in ("x", "h", "mod", "bias"):
        made[name].requires_grad_()
    return made


def modulate(inputs: Inputs) -> Tensor:
    _, shift, scale = inputs["mod"].chunk(3, 1)
    return kernels.adaln_modulate(inputs["x"], shift, scale)


def gate(inputs: Inputs) -> Tensor:
    return kernels.gate_residual(inputs["x"], inputs["h"], inputs["mod"].chunk(3, 1)[0])


def both(inputs: Inputs) -> tuple[Tensor, Tensor]:
    g, shift, scale = inputs["mod"].chunk(3, 1)
    return kernels.gate_residual_adaln(inputs["x"], inputs["h"], g, shift, scale)


def packed(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return kernels.gate_residual_adaln(inputs["x"], inputs["h"], modulation=inputs["mod"])


def packed_bias(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x, h, bias = inputs["x"], inputs["h"], inputs["bias"]
    return kernels.gate_residual_adaln(x, h, modulation=inputs["mod"], bias=bias)


def torch_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def plain(op: str, bias: bool, norm: Unary) -> Run:
    """The operator as the published DiT writes it: in the tensors' own dtype."""

    def run(inputs: Inputs) -> Tensor | tuple[Tensor, Tensor]:
        g, shift, scale = (t.unsqueeze(1) for t in inputs["mod"].chunk(3, 1))
        x, h = inputs["x"], inputs["h"] + inputs["bias"] if bias else inputs["h"]
        out = x + g * h if "gate" in op else x
        if op == "gate_residual":
            return out
        y = norm(out) * (1 + scale) + shift
        return (out, y) if "gate" in op else y

    return run


def case(op: str, variant: str, run: Run, tensors: int) -> Case:
    """tensors: (B, N, D) tensors read or written at least once."""
    names = ("x", "mod") if op == "adaln_modulate" else ("x", "h", "mod")
    names += ("bias",) * ("bias" in variant)
    upstream = ("dout", "dy") if op == "gate_residual_adaln" else ("dy",)

    def finished(forward: Run) -> Run:
        backward = variant.startswith(BACKWARD)
        return with_gradients(forward, names, upstream) if backward else forward

    rivals = {"DiT's lines": lambda: finished(plain(op, "bias" in variant, torch_norm))}
    if op != "gate_residual":
        for name, norm in LAYERNORMS.items():
            rivals[f"DiT's lines, {name}"] = lambda norm=norm: finished(
                plain(op, "bias" in variant, norm())
            )

    def moved(inputs: Inputs) -> int:
        return tensors * inputs["x"].numel() * inputs["x"].element_size()

    return Case(op, variant, make, finished(run), CPU, GPU, moved, sources=SOURCES, rivals=rivals)


CASES = (
    case("adaln_modulate", "forward", modulate, 2),
    case("adaln_modulate", BACKWARD, modulate, 5),
    case("gate_residual", "forward", gate, 3),
    case("gate_residual", BACKWARD, gate, 6),
    case("gate_residual_adaln", "forward", both, 4),
    case("gate_residual_adaln", BACKWARD, both, 10),
    case("gate_residual_adaln", f"{BACKWARD} packed", packed, 10),
    case("gate_residual_adaln", f"{BACKWARD} packed, bias", packed_bias, 10),
)
