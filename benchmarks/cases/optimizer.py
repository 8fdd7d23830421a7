"""The optimizer's pass: AdamW, averages and copies, beside what torch has for the same end.

A shape is (numbers in all, tensors, averages). Under ZeRO each rank has one flat float32 partition
per group, DeepSpeed scales the gradients and writes the 16-bit weights itself. In training the
state comes from memory, pushed out of the caches by a forward and a backward pass; here 32 million
numbers, 640 MB of state, are more than a processor's caches hold.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs, Run
from etude import kernels

SOURCES = ("kernels/optimizer.py", "kernels/optimizer_triton.py", "csrc/cpu/optimizer.cpp")
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
DECAYS = (0.999, 0.9999)


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, copied: bool) -> Inputs:
    """State of `shape[0]` weights, and bfloat16 copies of them where asked for."""
    numel, tensors, profiles = shape
    g = torch.Generator().manual_seed(0)
    each = numel // tensors
    params = [torch.randn(each, generator=g).to(device, dtype) for _ in range(tensors)]
    grads = [torch.randn(each, generator=g).to(device, dtype) for _ in range(tensors)]
    made = {
        "params": params,
        "grads": grads,
        "exp_avgs": [torch.zeros_like(p) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "emas": [[p.clone() for p in params] for _ in range(profiles)],
        "steps": [torch.zeros((), device=device) for _ in params],
    }
    return made | ({"copies": [p.bfloat16() for p in params]} if copied else {})


def step(inputs: Inputs) -> tuple[Tensor, ...]:
    decays = DECAYS[: len(inputs["emas"])]
    if inputs["params"][0].dtype == torch.float64:  # the gate's reference: no copy is rounded there
        given = {name: value for name, value in inputs.items() if name != "copies"}
        kernels.adamw_ema(**given, **SETTINGS, ema_decays=decays)
        return changed(given) + tuple(given["params"] if "copies" in inputs else ())
    kernels.adamw_ema(**inputs, **SETTINGS, ema_decays=decays)
    return changed(inputs)


def changed(inputs: Inputs) -> tuple[Tensor, ...]:
    averages = [t for profile in inputs["emas"] for t in profile]
    return *inputs["params"], *averages, *inputs.get("copies", ())


def by_torch(how: dict[str, bool]) -> Callable[[], Run]:
    """torch's AdamW in one of its forms, one foreach lerp per average, one foreach copy."""

    def factory() -> Run:
        made: dict[int, torch.optim.Optimizer] = {}

        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            params = inputs["params"]
            if id(params[0]) not in made:
                for p, g in zip(params, inputs["grads"], strict=True):
                    p.grad = g
                made[id(params[0])] = torch.optim.AdamW(params, **how, **SETTINGS)
            made[id(params[0])].step()
            with torch.no_grad():
                for decay, averages in zip(DECAYS, inputs["emas"], strict=False):
                    torch._foreach_lerp_(averages, params, 1 - decay)
                if "copies" in inputs:
                    torch._foreach_copy_(inputs["copies"], params)
            return changed(inputs)

        return run

    return factory


def moved(inputs: Inputs) -> int:
    """4 reads and 3 writes of float32, 2 more per average, 2 bytes per copy."""
    numel = sum(p.numel() for p in inputs["params"])
    return numel * (28 + 8 * len(inputs["emas"]) + 2 * ("copies" in inputs))


def case(variant: str, copied: bool, cpu: dict[str, tuple], gpu: dict[str, tuple]) -> Case:
    copying = " + foreach copy" * copied
    return Case(
        "adamw_ema",
        variant,
        partial(make, copied=copied),
        step,
        cpu,
        gpu,
        moved,
        dtypes=("float32",),
        sources=SOURCES,
        rivals={
            f"torch fused AdamW + foreach lerp{copying}": by_torch({"fused": True}),
            f"torch foreach AdamW + foreach lerp{copying}": by_torch({"foreach": True}),
        },
        compiled=False,
    )


CASES = (
    case(
        "step",
        False,
        {"32M, one average": (32_000_000, 10, 1), "32M, two averages": (32_000_000, 10, 2)},
        {
            "DiT-XL/2, one average": (675_000_000, 300, 1),
            "DiT-XL/2, two averages": (675_000_000, 300, 2),
        },
    ),
    case(
        "step with bf16 copies",
        True,
        {"32M, one average": (32_000_000, 10, 1)},
        {
            "DiT-XL/2, one average": (675_000_000, 300, 1),
            "DiT-XL/2, two averages": (675_000_000, 300, 2),
        },
    ),
    case(
        "step as under ZeRO",
        False,
        {"32M flat, one average": (32_000_000, 1, 1)},
        {"DiT-XL/2 over 8 ranks, one average": (84_375_000, 1, 1)},
    ),
)
