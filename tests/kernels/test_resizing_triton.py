"""The Triton twin of `resize`, run by the interpreter."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[[str], list[dict]]) -> list[dict]:
    return interpret("resizing")


# Bytes are equal. Values reach 2: float32 rounds a product and a sum, float16 once more.
@pytest.mark.parametrize(
    ("dtype", "bound", "count"), [("uint8", 0.0, 4), ("float32", 1e-6, 4), ("float16", 1e-3, 2)]
)
def test_interpreted_kernels_equal_the_reference(
    interpreted: list[dict], dtype: str, bound: float, count: int
) -> None:
    rows = [row for row in interpreted if row["dtype"] == dtype]
    assert len(rows) == count
    assert all(row["error"] <= bound for row in rows), rows


def test_interpreted_kernels_repeat_their_bits_and_keep_the_layout(interpreted) -> None:
    rows = [row for row in interpreted if "repeats" in row]
    assert all(row["repeats"] and row["dense"] for row in rows), rows
