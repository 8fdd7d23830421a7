"""The optimizer's pass: AdamW and weight averages, beside torch's fused AdamW and foreach lerps."""

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs, Run
from etude import kernels

SOURCES = ("kernels/optimizer.py", "csrc/cpu/optimizer.cpp")
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
DECAYS = (0.999, 0.9999)


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    """Ten tensors of shape[0] numbers in all; shape[1] averages."""
    numel, profiles = shape
    g = torch.Generator().manual_seed(0)
    params = [torch.randn(numel // 10, generator=g).to(device, dtype) for _ in range(10)]
    grads = [torch.randn(numel // 10, generator=g).to(device, dtype) for _ in range(10)]
    return {
        "params": params,
        "grads": grads,
        "exp_avgs": [torch.zeros_like(p) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "emas": [[p.clone() for p in params] for _ in range(profiles)],
        "steps": [torch.zeros((), device=device) for _ in params],
    }


def step(inputs: Inputs) -> tuple[Tensor, ...]:
    decays = DECAYS[: len(inputs["emas"])]
    kernels.adamw_ema(**inputs, **SETTINGS, ema_decays=decays)
    return *inputs["params"], *(t for profile in inputs["emas"] for t in profile)


def by_torch() -> Run:
    """Fused AdamW, then one foreach lerp per average."""
    made: dict[int, torch.optim.Optimizer] = {}

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        params = inputs["params"]
        if id(params) not in made:
            for p, g in zip(params, inputs["grads"], strict=True):
                p.grad = g
            made[id(params)] = torch.optim.AdamW(params, fused=True, **SETTINGS)
        made[id(params)].step()
        with torch.no_grad():
            for decay, averages in zip(DECAYS, inputs["emas"], strict=False):
                torch._foreach_lerp_(averages, params, 1 - decay)
        return *params, *(t for profile in inputs["emas"] for t in profile)

    return run


def moved(inputs: Inputs) -> int:
    numel = sum(p.numel() for p in inputs["params"])
    return 4 * numel * (4 + 3 + 2 * len(inputs["emas"]))


CASES = (
    Case(
        "adamw_ema",
        "step",
        make,
        step,
        {"4M, one average": (4_000_000, 1), "4M, two averages": (4_000_000, 2)},
        {"DiT-XL/2, one average": (675_000_000, 1)},
        moved,
        dtypes=("float32",),
        sources=SOURCES,
        rivals={"torch fused AdamW + foreach lerp": by_torch},
        compiled=False,
    ),
)
