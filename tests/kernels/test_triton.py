"""Triton twins: run by the interpreter, and compiled for three GPUs within a committed budget.

The interpreter must be chosen before Triton is imported, and compiling must happen without it, so
each half runs in its own process.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
HERE = Path(__file__).parent
BUDGET = json.loads((HERE / "triton_budget.json").read_text())


def script(name: str, *arguments: str, **environment: str) -> list[dict]:
    """Run a helper of this folder; it prints one JSON row per case."""
    made = subprocess.run(
        [sys.executable, str(HERE / name), *arguments],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return [json.loads(line) for line in made.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def interpreted() -> list[dict]:
    return script("interpret_adaln.py", TRITON_INTERPRET="1", ETUDE_KERNELS="triton")


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return script("compile_adaln.py")


# float32: another order of summation. float16: one rounding of each value, twice in the fused
# residual (the norm sees the stored one, and 3 columns leave little to normalise by).
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 5e-6), ("float16", 3e-3)])
def test_interpreted_kernels_equal_float64_autograd(
    interpreted: list[dict], dtype: str, bound: float
) -> None:
    rows = [row for row in interpreted if row["dtype"] == dtype]
    assert len({(r["op"], r["norm"], tuple(r["shape"])) for r in rows}) == 10
    bad = [r for r in rows if not r["error"] <= bound]
    assert not bad, bad


def test_interpreted_kernels_repeat_their_bits(interpreted: list[dict]) -> None:
    assert all(row["repeats"] for row in interpreted)


def test_compiled_kernels_stay_within_the_budget(compiled: list[dict]) -> None:
    assert {row["case"] for row in compiled} == set(BUDGET)
    for row in compiled:
        limit = BUDGET[row["case"]]
        assert row["spills"] == 0, row
        assert row["registers"] <= limit["registers"], (row, limit)
        assert row["shared"] <= limit["shared"], (row, limit)


def test_compiled_kernels_load_sixteen_bytes_at_once(compiled: list[dict]) -> None:
    rows = [row for row in compiled if "fwd" in row["case"]]
    assert rows and all(row["wide_loads"] for row in rows), rows
