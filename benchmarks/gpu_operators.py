"""Operators on a GPU, side by side: eager torch, torch.compile, Triton, CUDA, other libraries.

Run by `make gpu`. CUDA graphs of several calls timed with events, on random data, with inputs
rotated past the L2 cache; p20, p50 and p80 over rounds. Every provider is first compared with the
float64 reference. Rows are written one by one, beside two ceilings of the same run: a copy in GB/s
and a bf16 matmul in TFLOP/s. `--seconds N` starts no case after N seconds: cases are listed by what
matters most, and a cut run keeps what it has.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch

from benchmarks import registry, results
from benchmarks.case import Case
from etude.kernels import backends

ROTATED_BYTES = 256 * 2**20  # several copies of the inputs, together well above the L2 cache
FIRST = ("gate_residual_adaln", "attention", "adamw_ema")


def times(calls: list[Callable[[], object]], rounds: int = 30) -> list[float]:
    """Seconds of one call, per round, over a CUDA graph of all `calls` (plain calls where the
    provider cannot be captured)."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls * 2:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()

    def all_calls() -> None:
        for call in calls:
            call()

    replay = all_calls
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_calls()
        replay = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
    measured = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        measured.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return measured


def ceilings() -> dict[str, float]:
    """What this GPU does in this run: a device-to-device copy and a bf16 matmul."""
    a, b = (torch.randn(2**28, device="cuda") for _ in range(2))
    copy = 2 * a.numel() * 4 / results.quantiles(times([lambda: a.copy_(b)], 10))["p50_s"]
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(m)
    product = results.quantiles(times([lambda: torch.mm(m, m, out=out)], 10))["p50_s"]
    return {
        "copy_gb_s": round(copy / 1e9),
        "matmul_bf16_tflop_s": round(2 * 8192**3 / product / 1e12),
    }


def measure(case: Case, shape: str, dtype: str, provider: str, ceiling: dict[str, float]) -> dict:
    kind, sizes = registry.DTYPES[dtype], case.gpu_shapes[shape]
    inputs = case.make(sizes, kind, "cuda")
    moved, flops = case.bytes_moved(inputs), case.flops(inputs) if case.flops else 0
    row = {
        "op": case.op, "variant": case.variant, "shape": shape, "sizes": sizes, "dtype": dtype,
        "provider": provider, "source_hash": case.source_hash(), "bytes_moved": moved,
        "flops": flops,
    }  # fmt: skip
    with registry.provided(case, provider) as run:
        small = {n: min(s, 4) if n == 0 else s for n, s in enumerate(sizes)}
        gate = case.make(tuple(small.values()), kind, "cuda")
        row["error"] = registry.error(run(gate), registry.exact(case, gate))
        if not row["error"] < 1:
            return row | {"refused": "wrong values"}
        copies = max(1, min(8, ROTATED_BYTES // max(moved, 1)))
        sets = [inputs, *(case.make(sizes, kind, "cuda") for _ in range(copies - 1))]
        row |= results.quantiles(times([lambda s=s: run(s) for s in sets]))
    row["gb_s"] = moved / row["p50_s"] / 1e9
    row["tflop_s"] = flops / row["p50_s"] / 1e12
    row["of_copy"] = row["gb_s"] / ceiling["copy_gb_s"]
    row["of_matmul"] = row["tflop_s"] / ceiling["matmul_bf16_tflop_s"]
    return row


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Time the operators on this GPU.")
    parser.add_argument("operators", nargs="*", help="such as adaln_modulate; none: all")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after this long")
    asked = parser.parse_args(arguments)
    begun, wrong = time.monotonic(), 0
    ceiling = ceilings()
    common = results.machine() | ceiling
    listed = sorted(registry.cases(*asked.operators), key=lambda c: c.op not in FIRST)
    points = [(c, shape, dtype) for c in listed for shape in c.gpu_shapes for dtype in c.dtypes]
    points.sort(key=lambda point: point[2] != "bfloat16")  # what is trained in comes first
    for case, shape, dtype in points:
        if time.monotonic() - begun > asked.seconds:
            print(f"stopped before {case.name} {shape} {dtype}: {asked.seconds:.0f} s are over")
            break
        made = []
        for provider in registry.providers(case, "cuda"):
            try:
                row = measure(case, shape, dtype, provider, ceiling)
            except Exception as error:  # one provider's failure must not cost the others' numbers
                row = {
                    "op": case.op, "variant": case.variant, "shape": shape, "dtype": dtype,
                    "provider": provider, "failed": f"{type(error).__name__}: {error}"[:300],
                }  # fmt: skip
            ours = provider in backends.CHOICES
            wrong += ours and ("refused" in row or "failed" in row)
            results.append("operators_gpu", [common | row])
            made.append(row)
        done = [row for row in made if "p50_s" in row]
        print(results.table(done), *(r for r in made if r not in done), sep="\n", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
