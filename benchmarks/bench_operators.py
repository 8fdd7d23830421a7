"""Operators on the CPU, side by side: eager torch, torch.compile and C++ (`make bench`).

Eager and compiled run the operator's reference; the reference is what a person would write.
"""

import pytest
import torch

from benchmarks.registry import ADAMW, CASES, EMPTY, SHAPES, Case, activations, optimizer_state
from etude import kernels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROVIDERS = ("eager", "compiled", "cpp")
ROUNDS = {"rounds": 30, "warmup_rounds": 5, "iterations": 1}


def identify(benchmark, case: Case, **more: object) -> None:
    benchmark.extra_info.update(
        op=case.name, backward=case.backward, source_hash=case.source_hash(), **more
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["demo", "DiT-XL"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name + ("+backward" if c.backward else ""))
def test_adaln(benchmark, case: Case, shape: str, dtype: str, provider: str) -> None:
    benchmark.group = f"{case.name} {'backward' if case.backward else 'forward'} {shape} {dtype}"
    inputs = activations(SHAPES[shape], DTYPES[dtype])
    identify(
        benchmark, case, provider=provider, shape=SHAPES[shape], dtype=dtype,
        bytes_moved=case.bytes_moved(inputs),
    )  # fmt: skip
    with kernels.use_backend("cpp" if provider == "cpp" else "reference"):
        run = forward_compiled(case) if provider == "compiled" else case.run
        benchmark.pedantic(run, args=(inputs,), **ROUNDS)


def forward_compiled(case: Case):
    """The case with its operator compiled; autograd's backward is compiled with it."""
    from benchmarks import registry

    torch._dynamo.reset()
    forward = {
        "adaln_modulate": registry.modulate,
        "gate_residual": registry.gate,
        "gate_residual_adaln": registry.both,
    }[case.name]
    compiled = torch.compile(forward, fullgraph=True)
    if not case.backward:
        return compiled
    names = ("x", "mod") if case.name == "adaln_modulate" else ("x", "h", "mod")
    return registry.with_backward(compiled, names)


@pytest.mark.parametrize("provider", ["torch", "eager", "cpp"])
@pytest.mark.parametrize("profiles", [1, 2])
def test_adamw_ema(benchmark, profiles: int, provider: str) -> None:
    """Against torch's own: fused AdamW, then foreach averages."""
    numel = 4_000_000
    benchmark.group = f"adamw_ema {numel} {profiles} profiles"
    identify(benchmark, EMPTY, provider=provider, shape=(numel,), dtype="float32",
             bytes_moved=(4 + 3 + 2 * profiles) * 4 * numel)  # fmt: skip
    state = optimizer_state(numel, profiles)
    decays = ADAMW["ema_decays"][:profiles]
    if provider == "torch":
        run = by_torch(state, decays)
    else:

        def run() -> None:
            kernels.adamw_ema(**state, **(ADAMW | {"ema_decays": decays}))

    with kernels.use_backend("cpp" if provider == "cpp" else "reference"):
        benchmark.pedantic(run, rounds=10, warmup_rounds=2, iterations=1)


def by_torch(state: dict, decays: tuple[float, ...]):
    params = [p.requires_grad_() for p in state["params"]]
    for p, g in zip(params, state["grads"], strict=True):
        p.grad = g
    settings = {k: v for k, v in ADAMW.items() if k != "ema_decays"}
    optimizer = torch.optim.AdamW(params, fused=True, **settings)

    def run() -> None:
        optimizer.step()
        with torch.no_grad():
            for decay, averages in zip(decays, state["emas"], strict=True):
                torch._foreach_lerp_(averages, params, 1 - decay)

    return run
