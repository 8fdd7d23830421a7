"""The Triton twins of the solver's step and of the bytes, run by the interpreter."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[[str], list[dict]]) -> list[dict]:
    return interpret("solver")


def test_interpreted_steps_equal_float64(interpreted: list[dict]) -> None:
    rows = [row for row in interpreted if "error" in row]
    assert len(rows) == 4 * 3 * 2
    # Inputs of 16 bits are exact and outputs float32: a dozen roundings in every case.
    bad = [row for row in rows if not row["error"] <= 2e-6]
    assert not bad, bad


def test_interpreted_bytes_are_the_references(interpreted: list[dict]) -> None:
    assert [row["bytes"] for row in interpreted if "bytes" in row] == [True] * 6


def test_interpreted_kernels_repeat_their_bits(interpreted: list[dict]) -> None:
    assert all(row["repeats"] for row in interpreted if "repeats" in row)
