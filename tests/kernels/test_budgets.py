"""Every Triton kernel, compiled without a GPU, within its committed budget.

A change to a kernel may show on one of the three GPUs alone, so each is compiled for all of them.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from etude.kernels import catalogue, compiling

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
# (family, kernel) of kernels that spill, and why nothing better is possible.
SPILLS: dict[tuple[str, str], str] = {
    # 80 accumulators of dq per thread, 64 of p transposed as a product's left operand and 64 of
    # scores leave too few registers for addresses: 20 to 40 of them wait in L1 between their uses.
    ("attention", "short backward N=256 d=72"): "dq stays on chip",
    ("attention", "short backward N=256 rmsnorm rope d=72"): "dq stays on chip",
    ("attention", "short backward Nk=120 offsets d=72"): "dq stays on chip",
}
# Kernels that spill only as Triton 3.6 compiles them: the same source, through the same ptxas,
# spills nothing from Triton 3.7, so nothing in the source is at fault.
SPILLS_OF_3_6 = {
    ("attention", "long dk dv d=64"),
    ("attention", "long dk dv d=72"),
    ("attention", "long dk dv d=128"),
    ("attention", "long dk dv rmsnorm rope d=72"),
    ("attention", "short forward N=256 d=72"),
}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """A row of each kernel of every family, from one process without the interpreter."""
    made = subprocess.run(
        [sys.executable, "-m", "etude.kernels.compiling"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return [json.loads(line) for line in made.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("family", compiling.families())
def test_compiled_kernels_stay_within_the_budget(rows: list[dict], family: str) -> None:
    found = [row for row in rows if row["family"] == family]
    gpus = {row["toolchain"].split(", ")[-1] for row in found}
    known = {toolchain.split(", ")[-1] for toolchain in compiling.budget(family)}
    assert gpus <= known and len(gpus) == min(len(known), len(found))
    assert not compiling.differences(found)


@pytest.mark.parametrize("version", ["3.6", "3.7"])
def test_budgets_hold_no_spill_without_a_reason(version: str) -> None:
    spilling = {
        (family, kernel)
        for family in compiling.families()
        for toolchain, kernels in compiling.budget(family).items()
        for kernel, row in kernels.items()
        if row["spills"] and toolchain.startswith(f"triton {version}")
    }
    assert spilling == set(SPILLS) | (SPILLS_OF_3_6 if version == "3.6" else set())


def test_another_number_or_a_spill_is_a_difference() -> None:
    known = next(iter(compiling.budget("adaln")))
    kernel, row = next(iter(compiling.budget("adaln")[known].items()))
    same = {"family": "adaln", "toolchain": known, "kernel": kernel, **row}
    assert not compiling.differences([same])
    assert "the budget says" in compiling.differences([same | {"registers": 255}])[0]
    new = same | {"toolchain": "triton 9.9, ptxas 14.0, sm_90"}
    assert not compiling.differences([new | {"registers": 255}])
    assert "spills 8 bytes" in compiling.differences([new | {"spills": 8}])[0]


def test_every_family_with_triton_kernels_is_in_the_catalogue_with_a_budget() -> None:
    for family in compiling.families():
        assert family in catalogue.FAMILIES
        assert compiling.budget(family), f"type python -m etude.kernels.compiling {family} --write"
