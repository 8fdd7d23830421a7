"""`etude kernels tune FILE`: measure every operator's backends on this machine, write the best.

The file is what ETUDE_KERNELS=@FILE reads: one line `operator=backend` where another backend than
that of `auto` is faster over all of the operator's cases (geometric mean of the medians) by more
than 3%, under a comment that says where and when it was measured. Without that variable no such
file is looked at.
"""

import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks import registry, results
from benchmarks.case import Case, Inputs
from benchmarks.gpu_operators import times
from etude import kernels
from etude.kernels import backends

MARGIN = 0.97
WARM_UP, ROUNDS = 2, 10


def choices(op: str, device: str) -> list[str]:
    """Backends to choose from, the operator's own names included; auto's own comes first."""
    if op == "attention":  # which one auto takes depends on the call
        rows = kernels.attention_status(device)
        return ["auto", *(row["backend"] for row in rows if row["available"] == "yes")]
    twins = registry.twins(op)
    first = backends.pick(op, device, torch.float32, twins=twins)
    usable = {"cpp": device == "cpu" and backends.HAS_CPP}
    usable |= {"triton": device == "cuda" and backends.HAS_TRITON}
    usable |= {"cuda": device == "cuda" and backends.HAS_CUDA}
    others = [t for t in (*twins, "reference") if t != first and usable.get(t, t == "reference")]
    own = backends.OWN_CHOICES.get(op, {})
    # A name that stands on auto is what auto does.
    others += [name for name, twin in own.items() if twin != "auto" and usable.get(twin)]
    return [first, *others]


def refusal(case: Case, inputs: Inputs, backend: str) -> str:
    """Why a backend cannot serve a case; empty where it can. A name in the file must serve all."""
    try:
        with backends.use_backend("auto"), backends.use_backend(backend, op=case.op):
            case.run(inputs)
    except RuntimeError as error:
        return str(error)
    return ""


def medians(case: Case, inputs: Inputs, device: str, among: Iterable[str]) -> dict[str, float]:
    """Seconds by backend; on the CPU they take turns, so that a busy moment hits all of them."""
    measured: dict[str, list[float]] = {backend: [] for backend in among}
    if device == "cuda":
        for backend in measured:
            with backends.use_backend("auto"), backends.use_backend(backend, op=case.op):
                measured[backend] = times([lambda: case.run(inputs)])
    else:
        for _ in range(WARM_UP + ROUNDS):
            for backend, taken in measured.items():
                with backends.use_backend("auto"), backends.use_backend(backend, op=case.op):
                    begun = time.perf_counter()
                    case.run(inputs)
                    taken.append(time.perf_counter() - begun)
        measured = {backend: taken[WARM_UP:] for backend, taken in measured.items()}
    return {b: results.quantiles(taken)["p50_s"] for b, taken in measured.items()}


def best(op: str, device: str) -> str:
    """The fastest backend of one operator; prints what it measured."""
    logs: dict[str, list[float]] = {backend: [] for backend in choices(op, device)}
    first = next(iter(logs))
    for case in registry.cases(op):
        shapes = case.cpu_shapes if device == "cpu" else case.gpu_shapes
        for name, shape in shapes.items():
            for dtype in case.dtypes:
                inputs = case.make(shape, registry.DTYPES[dtype], device)
                for backend in [b for b in logs if b != first]:
                    if reason := refusal(case, inputs, backend):
                        print(f"{op}: {backend} is left out: {reason}", flush=True)
                        del logs[backend]
                found = medians(case, inputs, device, logs)
                for backend, seconds in found.items():
                    logs[backend].append(math.log(seconds))
                cells = "  ".join(f"{backend} {1e3 * s:.3g} ms" for backend, s in found.items())
                print(f"{case.name} {name} {dtype}: {cells}", flush=True)
    means = {backend: math.exp(sum(v) / len(v)) for backend, v in logs.items()}
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
