"""`etude kernels tune FILE`: measure every operator's backends on this machine, write the best.

The file is what ETUDE_KERNELS=@FILE reads: one line `operator=backend` where another backend than
that of `auto` is faster over all of the operator's cases (geometric mean of the medians) by more
than 3%, under a comment that says where and when it was measured. Without that variable no such
file is looked at.
"""

import math
import sys
import time
from pathlib import Path

import torch

from benchmarks import registry, results
from benchmarks.case import Case, Shape
from benchmarks.gpu_operators import times
from etude.kernels import backends

MARGIN = 0.97
WARM_UP, ROUNDS = 2, 10


def choices(op: str, device: str) -> list[str]:
    """Backends to choose from; auto's own comes first."""
    twins = registry.twins(op)
    first = backends.pick(op, device, torch.float32, twins=twins)
    usable = {"cpp": device == "cpu" and backends.HAS_CPP}
    usable |= {"triton": device == "cuda" and backends.HAS_TRITON}
    usable |= {"cuda": device == "cuda" and backends.HAS_CUDA}
    others = [t for t in (*twins, "reference") if t != first and usable.get(t, t == "reference")]
    return [first, *others]


def medians(case: Case, shape: Shape, dtype: str, device: str) -> dict[str, float]:
    """Seconds by backend; on the CPU they take turns, so that a busy moment hits all of them."""
    inputs = case.make(shape, registry.DTYPES[dtype], device)
    measured: dict[str, list[float]] = {backend: [] for backend in choices(case.op, device)}
    if device == "cuda":
        for backend in measured:
            with backends.use_backend(backend):
                measured[backend] = times([lambda: case.run(inputs)])
    else:
        for _ in range(WARM_UP + ROUNDS):
            for backend, taken in measured.items():
                with backends.use_backend(backend):
                    begun = time.perf_counter()
                    case.run(inputs)
                    taken.append(time.perf_counter() - begun)
        measured = {backend: taken[WARM_UP:] for backend, taken in measured.items()}
    return {b: results.quantiles(taken)["p50_s"] for b, taken in measured.items()}


def best(op: str, device: str) -> str:
    """The fastest backend of one operator; prints what it measured."""
    logs: dict[str, list[float]] = {}
    for case in registry.cases(op):
        shapes = case.cpu_shapes if device == "cpu" else case.gpu_shapes
        for name, shape in shapes.items():
            for dtype in case.dtypes:
                found = medians(case, shape, dtype, device)
                for backend, seconds in found.items():
                    logs.setdefault(backend, []).append(math.log(seconds))
                cells = "  ".join(f"{backend} {1e3 * s:.3g} ms" for backend, s in found.items())
                print(f"{case.name} {name} {dtype}: {cells}", flush=True)
    means = {backend: math.exp(sum(v) / len(v)) for backend, v in logs.items()}
    first = choices(op, device)[0]
    fastest = min(means, key=means.__getitem__)
    return fastest if means[fastest] < MARGIN * means[first] else first


def main(arguments: list[str]) -> int:
    if not arguments:
        print("say which file to write: etude kernels tune FILE [OPERATOR...]", file=sys.stderr)
        return 2
    file, operators = Path(arguments[0]), arguments[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        names = dict.fromkeys(case.op for case in registry.cases(*operators))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    chosen = {op: best(op, device) for op in names}
    machine = results.machine()
    lines = [
        f"# {machine['processor']}, {machine['threads']} threads, {machine['time']}, "
        f"torch {machine['versions']['torch']}",
        "auto",
        *(f"{op}={b}" for op, b in chosen.items() if b != choices(op, device)[0]),
    ]
    new = file.with_name(file.name + ".new")
    new.write_text("\n".join(lines) + "\n")
    new.replace(file)
    print(f"{file} is written: use it by ETUDE_KERNELS=@{file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
