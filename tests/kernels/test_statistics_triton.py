"""The Triton twin of `moments`, run by the interpreter."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[[str], list[dict]]) -> list[dict]:
    return interpret("statistics")


def test_interpreted_sums_are_those_of_extended_precision(interpreted: list[dict]) -> None:
    assert len(interpreted) == 20
    for row in interpreted:  # the bound of kernels/statistics.py
        assert row["error"] <= (row["shape"][0] + 3) * 2.0**-53, row


def test_interpreted_sums_repeat_their_bits_and_are_symmetric(interpreted: list[dict]) -> None:
    assert all(row["repeats"] and row["symmetric"] for row in interpreted)
