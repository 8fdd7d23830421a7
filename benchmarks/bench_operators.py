"""Operators on the CPU, side by side: eager torch, torch.compile, C++ by level, other libraries.

Run by `make bench` and `etude kernels bench` through `run.py`, which passes the operators asked for
in ETUDE_BENCH and the time for each row in ETUDE_BENCH_SECONDS. Eager and compiled run the
operator's reference: it is what a person would write.
"""

import os
import time

import pytest
from torch import Tensor

from benchmarks import registry
from benchmarks.case import Case, Inputs

OPERATORS = [name for name in os.environ.get("ETUDE_BENCH", "").split(",") if name]
SECONDS = float(os.environ.get("ETUDE_BENCH_SECONDS", "0.3"))
FEWEST, MOST = 7, 50  # rounds: seven, so that p20 and p80 are not the extremes
POINTS = [
    pytest.param(case, shape, dtype, provider, id=f"{case.name}-{shape}-{dtype}-{provider}")
    for case in registry.cases(*OPERATORS)
    for shape in case.cpu_shapes
    for dtype in case.dtypes
    for provider in registry.providers(case, "cpu")
]
_wanted: dict[tuple[str, ...], list[Tensor]] = {}


def wanted(case: Case, shape: str, dtype: str, inputs: Inputs) -> list[Tensor]:
    """The float64 reference, kept for the other providers of the same row, which come next."""
    key = (case.name, shape, dtype)
    if key not in _wanted:
        _wanted.clear()
        _wanted[key] = registry.exact(case, inputs)
    return _wanted[key]


@pytest.mark.parametrize(("case", "shape", "dtype", "provider"), POINTS)
def test_operator(benchmark, case: Case, shape: str, dtype: str, provider: str) -> None:
    kind = registry.DTYPES[dtype]
    inputs = case.make(case.cpu_shapes[shape], kind, "cpu")
    want = wanted(case, shape, dtype, inputs)
    benchmark.group = f"{case.name} {shape} {dtype}"
    with registry.provided(case, provider) as run:
        error = registry.error(run(case.make(case.cpu_shapes[shape], kind, "cpu")), want)
        assert error < 1, f"wrong values are not timed: error {error:.3g}"
        benchmark.extra_info.update(
            op=case.op, variant=case.variant, shape=shape, sizes=case.cpu_shapes[shape],
            dtype=dtype, provider=provider, source_hash=case.source_hash(),
            bytes_moved=case.bytes_moved(inputs), flops=case.flops(inputs) if case.flops else 0,
        )  # fmt: skip
        run(inputs)
        begun = time.perf_counter()
        run(inputs)
        one = time.perf_counter() - begun
        rounds = min(MOST, max(FEWEST, int(SECONDS / max(one, 1e-9))))
        benchmark.pedantic(run, args=(inputs,), rounds=rounds, warmup_rounds=2, iterations=1)
