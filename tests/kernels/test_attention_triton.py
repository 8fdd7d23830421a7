"""The Triton attention kernels, run by the interpreter, and how launches are chosen."""

from collections.abc import Callable

import pytest

from etude.kernels.attention_config import LaunchConfig

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[[str], list[dict]]) -> list[dict]:
    return interpret("attention")


# float32: another order of summation, and one more for the norm's gradient. float16: q and k are
# rounded after norm and rotation, p, ds and every output once (2^-11 / sqrt(3) each, and gradients
# before the norm's once more); the sums of a weight's gradient do not average a rounding of q away.
# bfloat16 is eight times coarser, and the interpreter truncates it: twice that again.
@pytest.mark.parametrize(
    ("dtype", "bound", "cases"),
    [("float32", 2e-6, 19), ("float16", 2e-3, 10), ("bfloat16", 3e-2, 2)],
)
@pytest.mark.parametrize("form", ["short", "long"])
def test_interpreted_kernels_equal_float64_autograd(
    interpreted: list[dict], dtype: str, bound: float, cases: int, form: str
) -> None:
    rows = [r for r in interpreted if r["check"] == "values"]
    rows = [r for r in rows if (r["dtype"], r["form"]) == (dtype, form)]
    assert len(rows) == cases
    bad = [r for r in rows if not r["error"] <= bound]
    assert not bad, bad


def test_interpreted_kernels_repeat_their_bits(interpreted: list[dict]) -> None:
    assert all(r["repeats"] for r in interpreted if r["check"] == "values")


@pytest.mark.parametrize(
    ("check", "count"), [("empty", 3), ("opcheck", 2), ("gradients", 1), ("sentence", 8)]
)
def test_interpreted_operators(interpreted: list[dict], check: str, count: int) -> None:
    rows = [r for r in interpreted if r["check"].startswith(check)]
    assert len(rows) == count
    assert all(r["fine"] for r in rows), [r for r in rows if not r["fine"]]


def test_heads_are_cut_into_tiles_that_waste_little() -> None:
    """At least d, at most the next power of two, and 80 rather than 128 for 72."""
    from etude.kernels.attention_tiles import head_tiles

    assert [head_tiles(d) for d in (64, 72, 80, 96, 120, 128)] == [
        (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 0),
    ]  # fmt: skip
    for d in range(1, 257):
        D0, D1 = head_tiles(d)
        assert d <= D0 + D1 <= max(16, 1 << (d - 1).bit_length())


def test_launches_of_the_short_form_hold_their_rows_and_keys() -> None:
    for major in (8, 9, 10):
        for itemsize in (2, 4):
            for n in (1, 16, 17, 77, 120, 256, 257, 1024):
                config = LaunchConfig.short_forward(n, 80, itemsize, major, False, False)
                assert config is None or config.keys >= n
                config = LaunchConfig.short_backward(n, n, 80, itemsize, major, False)
                assert config is None or config.rows >= n
    assert LaunchConfig.short_forward(256, 80, 2, 9, False, False) is not None
    assert LaunchConfig.short_backward(256, 256, 80, 2, 9, False) is not None
