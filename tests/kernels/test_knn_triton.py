"""The Triton twins of the nearest-neighbour operators, run by the interpreter."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[[str], list[dict]]) -> list[dict]:
    return interpret("knn")


@pytest.mark.parametrize("what", ["distances", "rows", "counts", "repeats"])
def test_interpreted_kernels_equal_float64(interpreted: list[dict], what: str) -> None:
    assert len(interpreted) == 4
    assert all(row[what] for row in interpreted), interpreted
