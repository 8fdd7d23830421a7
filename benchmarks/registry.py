"""What is measured: one case per operator, its inputs, and the bytes it cannot avoid moving.

Used by `bench_operators.py` (pytest-benchmark, CPU) and `gpu_operators.py` (CUDA events).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from etude import kernels

ROOT = Path(__file__).resolve().parent.parent
Inputs = dict[str, Tensor]
ADALN_SOURCES = ("kernels/adaln.py", "kernels/adaln_triton.py", "csrc/cpu/adaln.cpp")
OPTIMIZER_SOURCES = ("kernels/optimizer.py", "csrc/cpu/optimizer.cpp")


@dataclass(frozen=True)
class Case:
    """One operator. `run` does one call (backward included where `backward`) on made inputs."""

    name: str
    backward: bool
    run: Callable[[Inputs], object]
    sources: tuple[str, ...]
    tensors_moved: int  # (B, N, D) tensors read or written at least once

    def bytes_moved(self, inputs: Inputs) -> int:
        x = inputs["x"]
        return self.tensors_moved * x.numel() * x.element_size()

    def source_hash(self) -> str:
        """A row is stale when this differs from the tree's."""
        digest = hashlib.sha256()
        for name in self.sources:
            digest.update((ROOT / name).read_bytes())
        return digest.hexdigest()[:16]


def activations(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Random x, h, their upstream gradients and a modulation whose chunks are strided views."""
    batch, rows, width = shape
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(device, dtype)

    names = ("x", "h", "dout", "dy")
    made = {name: normal(batch, rows, width) for name in names} | {"mod": normal(batch, 3 * width)}
    for name in ("x", "h", "mod"):
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


def with_backward(forward: Callable, names: tuple[str, ...]) -> Callable[[Inputs], object]:
    def run(inputs: Inputs) -> object:
        outputs = forward(inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [inputs["dy"]] if len(outputs) == 1 else [inputs["dout"], inputs["dy"]]
        return torch.autograd.grad(outputs, [inputs[n] for n in names], upstream)

    return run


CASES = (
    Case("adaln_modulate", False, modulate, ADALN_SOURCES, 2),
    Case("adaln_modulate", True, with_backward(modulate, ("x", "mod")), ADALN_SOURCES, 5),
    Case("gate_residual", False, gate, ADALN_SOURCES, 3),
    Case("gate_residual", True, with_backward(gate, ("x", "h", "mod")), ADALN_SOURCES, 6),
    Case("gate_residual_adaln", False, both, ADALN_SOURCES, 4),
    Case("gate_residual_adaln", True, with_backward(both, ("x", "h", "mod")), ADALN_SOURCES, 10),
)
SHAPES = {"demo": (256, 16, 144), "DiT-B": (8, 256, 768), "DiT-XL": (8, 256, 1152)}


def optimizer_state(numel: int, profiles: int, device: str = "cpu") -> dict:
    """Ten tensors, float32, and `profiles` averages, as keyword arguments of `adamw_ema`."""
    g = torch.Generator().manual_seed(0)
    params = [torch.randn(numel // 10, generator=g).to(device) for _ in range(10)]
    like = [torch.randn(numel // 10, generator=g).to(device) for _ in range(10)]
    return {
        "params": params,
        "grads": like,
        "exp_avgs": [torch.zeros_like(p) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "emas": [[p.clone() for p in params] for _ in range(profiles)],
        "steps": [torch.zeros((), device=device) for _ in params],
    }


ADAMW = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
ADAMW["ema_decays"] = (0.999, 0.9999)
EMPTY = Case("adamw_ema", False, lambda inputs: None, OPTIMIZER_SOURCES, 0)
