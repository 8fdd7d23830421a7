"""The Triton twins of GroupNorm, run by the interpreter."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[[str], list[dict]]) -> list[dict]:
    return interpret("groupnorm")


# float32: the rounding of x's mean, three deviations from zero. float16: one rounding per output.
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("float16", 1e-3)])
def test_interpreted_kernels_equal_float64(
    interpreted: list[dict], dtype: str, bound: float
) -> None:
    rows = [row for row in interpreted if row["dtype"] == dtype]
    assert len(rows) == 10 and {r["whole"] for r in rows} == {True, False}
    assert all(r["errors"].keys() == {"y", "dx", "dweight", "dbias"} for r in rows)
    bad = [r for r in rows if not max(r["errors"].values()) <= bound]
    assert not bad, bad


def test_interpreted_kernels_repeat_their_bits(interpreted: list[dict]) -> None:
    assert all(row["repeats"] for row in interpreted)
