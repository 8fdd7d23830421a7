"""Bias with GELU, SwiGLU and the two-layer perceptron, at the inner widths of the DiTs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Inputs, Run, with_gradients
from benchmarks.libraries import liger_swiglu, quack_linear_gelu, quack_mlp
from etude import kernels

SOURCES = (
    "kernels/activation.py",
    "kernels/activation_triton.py",
    "csrc/cpu/activation.cpp",
    "csrc/cpu/vectormath.h",
)
CPU = {"demo": (4096, 576), "DiT-XL": (1024, 4608)}
GPU = {"DiT-B": (64 * 256, 3072), "DiT-XL": (64 * 256, 4608), "DiT-XL B=256": (256 * 256, 4608)}
# Rows and width; the hidden layer is four times as wide.
CPU_MLP = {"demo": (4096, 144), "DiT-XL": (256, 1152)}
GPU_MLP = {"DiT-B": (64 * 256, 768), "DiT-XL": (64 * 256, 1152), "DiT-XL B=256": (65536, 1152)}
BACKWARD = "forward+backward"


def normal(*sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=g).to(device, dtype) for size in sizes]


def make_gelu(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    x, bias, dy = normal(shape, shape[-1:], shape, dtype=dtype, device=device)
    return {"x": x.requires_grad_(), "bias": bias.requires_grad_(), "dy": dy}


def make_swiglu(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    rows, width = shape
    x, dy = normal((rows, 2 * width), shape, dtype=dtype, device=device)
    return {"x": x.requires_grad_(), "dy": dy}


def make_linear(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    rows, width = shape
    inner = 4 * width
    sizes = (shape, (inner, width), (inner,), (rows, inner))
    x, w1, b1, dy = normal(*sizes, dtype=dtype, device=device)
    made = {"x": x, "w1": w1 / width**0.5, "b1": b1}
    return {name: t.detach().requires_grad_() for name, t in made.items()} | {"dy": dy}


def make_mlp(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    rows, width = shape
    inner = 4 * width
    sizes = (shape, (inner, width), (inner,), (width, inner), (width,), shape)
    x, w1, b1, w2, b2, dy = normal(*sizes, dtype=dtype, device=device)
    made = {"x": x, "w1": w1 / width**0.5, "b1": b1, "w2": w2 / inner**0.5, "b2": b2}
    return {name: t.detach().requires_grad_() for name, t in made.items()} | {"dy": dy}


def gelu(inputs: Inputs) -> Tensor:
    return kernels.bias_gelu(inputs["x"], inputs["bias"])


def gelu_erf(inputs: Inputs) -> Tensor:
    return kernels.bias_gelu(inputs["x"], inputs["bias"], "none")


def swiglu(inputs: Inputs) -> Tensor:
    return kernels.swiglu(inputs["x"])


def mlp(inputs: Inputs) -> Tensor:
    return kernels.mlp(*(inputs[n] for n in ("x", "w1", "b1", "w2", "b2")))


def linear_gelu(inputs: Inputs) -> Tensor:
    return kernels.linear_gelu(*(inputs[n] for n in ("x", "w1", "b1")))


def torch_gelu(form: str) -> Run:
    return lambda inputs: F.gelu(inputs["x"] + inputs["bias"], approximate=form)


def torch_swiglu(inputs: Inputs) -> Tensor:
    gate, value = inputs["x"].chunk(2, -1)
    return F.silu(gate) * value


def torch_linear_gelu(inputs: Inputs) -> Tensor:
    return F.gelu(F.linear(inputs["x"], inputs["w1"], inputs["b1"]), approximate="tanh")


def torch_mlp(inputs: Inputs) -> Tensor:
    x, w1, b1, w2, b2 = (inputs[n] for n in ("x", "w1", "b1", "w2", "b2"))
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def liger() -> Run:
    swiglu = liger_swiglu()
    return lambda inputs: swiglu(inputs["x"])


def quack(op: str) -> Run:
    names, run = (MLP, quack_mlp()) if op == "mlp" else (LINEAR, quack_linear_gelu())
    return lambda inputs: run(*(inputs[n] for n in names))


def case(
    op: str, variant: str, run: Run, rival: Run, make, names: tuple[str, ...], tensors: int
) -> Case:
    """tensors: how many times the size of dy is read or written at least once."""
    backward = variant.startswith(BACKWARD)

    def finished(forward: Run) -> Run:
        return with_gradients(forward, names, ("dy",)) if backward else forward

    rivals = {"torch": lambda: finished(rival)}
    if op == "swiglu":
        rivals["Liger"] = lambda: finished(liger())
    if op in ("linear_gelu", "mlp") and not backward:  # its backward takes no bias in its own MLP
        rivals["quack"] = lambda: quack(op)
    products = {"linear_gelu": 1, "mlp": 2}.get(op, 0)
    cpu, gpu = (CPU_MLP, GPU_MLP) if products else (CPU, GPU)

    def moved(inputs: Inputs) -> int:
        return tensors * inputs["dy"].numel() * inputs["dy"].element_size()

    def flops(inputs: Inputs) -> int:
        once = 2 * products * inputs["x"].numel() * inputs["w1"].shape[0]
        return (3 if backward else 1) * once

    return Case(
        op,
        variant,
        make,
        finished(run),
        cpu,
        gpu,
        moved,
        flops=flops if products else None,
        sources=SOURCES,
        rivals=rivals,
    )


LINEAR = ("x", "w1", "b1")
MLP = ("x", "w1", "b1", "w2", "b2")
BOTH = ("x", "bias")
CASES = (
    case("bias_gelu", "forward", gelu, torch_gelu("tanh"), make_gelu, BOTH, 2),
    case("bias_gelu", BACKWARD, gelu, torch_gelu("tanh"), make_gelu, BOTH, 5),
    case("bias_gelu", "forward erf", gelu_erf, torch_gelu("none"), make_gelu, BOTH, 2),
    case("bias_gelu", f"{BACKWARD} erf", gelu_erf, torch_gelu("none"), make_gelu, BOTH, 5),
    case("swiglu", "forward", swiglu, torch_swiglu, make_swiglu, ("x",), 3),
    case("swiglu", BACKWARD, swiglu, torch_swiglu, make_swiglu, ("x",), 8),
    # y is four times as wide as x; backward reads the product as well.
    case("linear_gelu", "forward", linear_gelu, torch_linear_gelu, make_linear, LINEAR, 1),
    case("linear_gelu", BACKWARD, linear_gelu, torch_linear_gelu, make_linear, LINEAR, 4),
    # x and y, the hidden layer written and read (4 times as wide); backward as many again, twice.
    case("mlp", "forward", mlp, torch_mlp, make_mlp, MLP, 2 + 8),
    case("mlp", BACKWARD, mlp, torch_mlp, make_mlp, MLP, 3 * (2 + 8)),
)
