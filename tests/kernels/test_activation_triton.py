"""The Triton twins of the activations, run by the interpreter."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[[str], list[dict]]) -> list[dict]:
    return interpret("activation")


# float32: another order of summation, and the erf form's cancellation in its left tail. float16:
# one rounding of each value; for the MLP one more of its hidden layer and of that layer's gradient.
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-6), ("float16", 1.5e-3)])
def test_interpreted_kernels_equal_float64(
    interpreted: list[dict], dtype: str, bound: float
) -> None:
    rows = [row for row in interpreted if row["dtype"] == dtype]
    assert len({r["op"] for r in rows}) == {"float32": 15, "float16": 19}[dtype]
    assert all({"y", "dx"} <= r["errors"].keys() for r in rows)
    bad = [r for r in rows if not max(r["errors"].values()) <= bound]
    assert not bad, bad


def test_the_mlp_s_gradients_are_all_there(interpreted: list[dict]) -> None:
    rows = [row for row in interpreted if row["op"].startswith("mlp")]
    assert rows and all(len(r["errors"]) == 6 for r in rows)


def test_interpreted_kernels_repeat_their_bits(interpreted: list[dict]) -> None:
    assert all(row["repeats"] for row in interpreted)
