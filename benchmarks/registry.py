"""All cases, their providers and the gate that a number must pass before it is taken.

Used by `bench_operators.py` (pytest-benchmark, CPU) and `gpu_operators.py` (CUDA events), which
`make bench`, `etude kernels bench` and `make gpu` run, and by `etude kernels tune`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs, Run
from etude import kernels
from etude.kernels import backends, catalogue

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest accepted difference from the float64 reference, over its largest value.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def cases(*operators: str) -> list[Case]:
    """Every case, or those of the operators named. Errors: ValueError for an unknown operator."""
    files = sorted(Path(__file__).parent.glob("cases/[a-z]*.py"))
    every = [c for f in files for c in import_module(f"benchmarks.cases.{f.stem}").CASES]
    unknown = sorted(set(operators) - {case.op for case in every})
    if unknown:
        known = ", ".join(dict.fromkeys(case.op for case in every))
        raise ValueError(f"no benchmark of {', '.join(unknown)}: there are {known}")
    return [case for case in every if not operators or case.op in operators]


def twins(op: str) -> tuple[str, ...]:
    """The twins an operator has beside its reference."""
    listed = (o for family in catalogue.operators().values() for o in family)
    return next((o.twins for o in listed if o.name == op), ())


def providers(case: Case, device: str) -> list[str]:
    """Names of what can run a case on "cpu" or "cuda", weakest first; rivals that import last."""
    names = ["eager"] + ["compiled"] * case.compiled
    has = twins(case.op)
    if device == "cpu" and backends.HAS_CPP and "cpp" in has:
        names += [f"cpp {level}" for level in backends.cpp().levels() if level != "base"] or ["cpp"]
    if device == "cuda":
        names += ["triton"] * (backends.HAS_TRITON and "triton" in has)
        names += ["cuda"] * (backends.HAS_CUDA and "cuda" in has)
    for name, factory in case.rivals.items():
        try:
            factory()
        except ImportError:
            continue
        names.append(name)
    return names


@contextmanager
def provided(case: Case, provider: str) -> Iterator[Run]:
    """The case's `run` by one provider; inside the context its backend is in force."""
    backend, _, level = provider.partition(" ")
    if provider in case.rivals:
        yield case.rivals[provider]()
    elif provider == "compiled":
        torch._dynamo.reset()
        with kernels.use_backend("reference"):
            yield torch.compile(case.run)
    elif backend == "cpp":
        before = backends.cpp().set_level(level) if level else ""
        try:
            with kernels.use_backend("cpp"):
                yield case.run
        finally:
            if before:
                backends.cpp().set_level(before)
    else:
        with kernels.use_backend("reference" if provider == "eager" else provider):
            yield case.run


def widened(value: Any) -> Any:
    """Inputs with every floating tensor in float64, leaves and their requires_grad kept."""
    if isinstance(value, Tensor):
        wide = value.detach().double() if value.is_floating_point() else value.detach().clone()
        return wide.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: widened(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(widened(one) for one in value)
    return value


def exact(case: Case, inputs: Inputs) -> list[Tensor]:
    """What the reference gives in float64."""
    with kernels.use_backend("reference"):
        return tensors(case.run(widened(inputs)))


def tensors(outputs: object) -> list[Tensor]:
    made = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return [t.detach() for t in made if isinstance(t, Tensor)]


def error(got: object, want: list[Tensor]) -> float:
    """Largest difference over the largest value, per output, in units of what its dtype allows.

    Above 1 the values are wrong; infinite where one is missing, has another shape or is NaN.
    """
    found = tensors(got)
    if len(found) != len(want):
        return float("inf")
    worst = 0.0
    for a, b in zip(found, want, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel():
            scale = b.double().abs().max().clamp_min(1e-30)
            apart = float((a.double() - b.double()).abs().max() / scale)
            if math.isnan(apart):
                return float("inf")
            worst = max(worst, apart / BOUND.get(a.dtype, BOUND[torch.float32]))
    return worst
