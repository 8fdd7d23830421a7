"""The Triton kernel of 8-bit rows, run by the interpreter up to the cast.

The interpreter rounds float8 wrongly, so the kernel writes the scaled values as float32 there; the
cast itself is compiled for the GPUs that have it (test_budgets.py) and run by test_fp8_gpu.py.
"""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[[str], list[dict]]) -> list[dict]:
    return interpret("fp8")


@pytest.fixture(scope="module")
def values(interpreted: list[dict]) -> list[dict]:
    return [row for row in interpreted if "strange" not in row]


def test_nan_stays_nan_and_rows_too_small_for_a_scale_are_zeros(interpreted: list[dict]) -> None:
    (strange,) = [row["strange"] for row in interpreted if "strange" in row]
    assert strange == {"nan": [72, 1, 0], "tiny": True, "reference": True}


def test_scaled_values_before_the_cast(values: list[dict]) -> None:
    assert len(values) == 8
    for row in values:
        # float32 sums in another order; y is rounded to float16: half a step is 2^-11.
        assert row["scale"] < 2e-6 and row["values"] < 2e-6 and row["statistics"], row
        assert row["y"] < 5e-4 if row["keep"] else row["y"] == 0, row
        assert row["largest"] <= 448.0, row


def test_a_row_of_zeros_has_scale_one(values: list[dict]) -> None:
    assert all(row["zeros"] for row in values)
