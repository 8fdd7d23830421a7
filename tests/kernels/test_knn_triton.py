"""The Triton twins of the nearest-neighbour operators, run by the interpreter."""

from collections.abc import Callable

import pytest

WHAT = ("distances", "rows", "repeats", "per query", "per reference", "all others")


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[[str], list[dict]]) -> list[dict]:
    return interpret("knn")


@pytest.mark.parametrize("what", WHAT)
def test_interpreted_kernels_equal_float64(interpreted: list[dict], what: str) -> None:
    assert len(interpreted) == 1 and interpreted[0][what], interpreted
