"""The Triton twins of noise, noising and losses, run by the interpreter."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[[str], list[dict]]) -> list[dict]:
    return interpret("noising")


# Losses are float32 in either case. float32: roundings, those of a variance's exponentials of
# logarithms near -10 more than others. float16: one rounding of each value.
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("float16", 6e-4)])
def test_interpreted_kernels_equal_float64(
    interpreted: list[dict], dtype: str, bound: float
) -> None:
    rows = [row for row in interpreted if row.get("dtype") == dtype]
    assert len(rows) == 7 * 3
    for row in rows:
        for name, error in row["errors"].items():
            loss = name == "output" and row["case"][0] == "diffusion_loss"
            limit = 2e-6 if loss else 10 * bound if name == "dvariance" else bound
            assert error <= limit, (row, name)


def test_interpreted_noise_is_within_the_stated_distance(interpreted: list[dict]) -> None:
    assert [row["worst"] < 2e-6 for row in interpreted if "worst" in row] == [True]


def test_interpreted_variance_that_is_not_a_number_shows_in_the_loss(interpreted) -> None:
    assert [row["not a number"] for row in interpreted if "not a number" in row] == [
        [True, False, True, False]
    ]


def test_interpreted_kernels_repeat_their_bits(interpreted: list[dict]) -> None:
    assert all(row["repeats"] for row in interpreted if "repeats" in row)
