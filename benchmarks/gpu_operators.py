"""Operators on a GPU, side by side: eager torch, torch.compile and Triton (`make gpu`).

CUDA graphs of several calls timed with events, on random data, with inputs rotated past the L2
cache; medians over rounds. Every case is first compared with its reference. Rows are written one by
one, beside two ceilings of the same run: a copy in GB/s and a bf16 matmul in TFLOP/s.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import registry
import results

from etude import kernels

SHAPES = {"DiT-B": (64, 256, 768), "DiT-XL": (64, 256, 1152)}
ROTATE = 4  # copies of the inputs: together well above 60 MB
FORWARD = {
    "adaln_modulate": registry.modulate,
    "gate_residual": registry.gate,
    "gate_residual_adaln": registry.both,
}


def seconds(calls: list[Callable[[], object]], rounds: int = 30) -> float:
    """Median time of one call, over a CUDA graph of all `calls`."""
    for call in calls * 3:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    a, b = (torch.randn(2**28, device="cuda") for _ in range(2))
    copy = 2 * a.numel() * 4 / seconds([lambda: a.copy_(b)], 10) / 1e9
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(m)
    flops = 2 * 8192**3 / seconds([lambda: torch.mm(m, m, out=out)], 10) / 1e12
    return {"copy_gb_s": round(copy), "matmul_bf16_tflop_s": round(flops)}


def provider_run(case: registry.Case, provider: str) -> Callable[[registry.Inputs], object]:
    if provider != "compiled":
        return case.run
    torch._dynamo.reset()
    forward = torch.compile(FORWARD[case.name], fullgraph=True)
    names = ("x", "mod") if case.name == "adaln_modulate" else ("x", "h", "mod")
    return registry.with_backward(forward, names) if case.backward else forward


def largest_error(run: Callable, case: registry.Case, inputs: registry.Inputs) -> float:
    """Largest difference from the float64 reference over its largest value."""
    wide = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    got = run(inputs)
    with kernels.use_backend("reference"):
        want = case.run(wide)
    got, want = ((t if isinstance(t, tuple) else (t,)) for t in (got, want))
    pairs = zip(got, want, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def measure(case: registry.Case, shape: str, dtype: torch.dtype, provider: str) -> dict:
    sets = [registry.activations(SHAPES[shape], dtype, "cuda") for _ in range(ROTATE)]
    row = {
        "op": case.name,
        "backward": case.backward,
        "provider": provider,
        "shape": SHAPES[shape],
        "dtype": str(dtype).removeprefix("torch."),
        "source_hash": case.source_hash(),
    }
    with kernels.use_backend("triton" if provider == "triton" else "reference"):
        run = provider_run(case, provider)
        row["error"] = largest_error(run, case, sets[0])
        if not row["error"] < (3e-2 if dtype == torch.bfloat16 else 1e-4):
            return row | {"refused": "wrong values"}
        time = seconds([lambda s=s: run(s) for s in sets])
    return row | {"median_s": time, "gb_s": case.bytes_moved(sets[0]) / time / 1e9}


def main() -> int:
    common = results.machine() | ceilings()
    wrong = 0
    for case in registry.CASES:
        for shape in SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                for provider in ("eager", "compiled", "triton"):
                    row = measure(case, shape, dtype, provider)
                    wrong += "refused" in row
                    results.append("operators_gpu", [common | row])
                    print(case.name, case.backward, shape, dtype, provider, row, flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
