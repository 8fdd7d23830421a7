"""The Triton twins of the adaLN operators, run by the interpreter."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[[str], list[dict]]) -> list[dict]:
    return interpret("adaln")


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
