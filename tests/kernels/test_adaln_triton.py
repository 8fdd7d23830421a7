"""The Triton twins of the adaLN operators, run by the interpreter; their launch heuristic."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[[str], list[dict]]) -> list[dict]:
    return interpret("adaln")


# float32: another order of summation. float16: one rounding of each value, twice in the fused
# residual (the norm sees the stored one, and 3 columns leave little to normalise by).
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 5e-6), ("float16", 3e-3)])
def test_interpreted_kernels_equal_float64_autograd(
    interpreted: list[dict], dtype: str, bound: float
) -> None:
    rows = [row for row in interpreted if row["dtype"] == dtype]
    assert len(rows) == 8 and all(row["names"] for row in rows)
    bad = [r for r in rows if not r["error"] <= bound]
    assert not bad, bad


def test_interpreted_kernels_repeat_their_bits(interpreted: list[dict]) -> None:
    assert all(row["repeats"] for row in interpreted)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("D", [1, 16, 63, 64, 72, 144, 384, 768, 1024, 1152, 1536, 4096, 16384])
def test_two_pieces_cover_a_row_and_waste_less_than_one(D: int) -> None:
    from etude.kernels.adaln_triton import LaunchConfig

    for B, N in ((1, 1), (3, 7), (256, 256), (2, 4096)):
        c = LaunchConfig.for_shape(B, N, D)
        width = c.block_a + c.block_b
        assert width >= D and c.exact == (width == D)
        assert all(n & (n - 1) == 0 for n in (c.block_a, c.block_b, c.tile, c.warps))
        assert c.block_b == 0 or c.block_a < D, "the first of two pieces has no mask"
        assert 1 <= c.tile <= N and 1 <= c.rows <= N
    assert width <= max(16, 2 * D)
    if D in (144, 384, 768, 1152, 1536):
        assert width == D


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("shape", [(256, 256, 1152), (32, 256, 1152), (24, 1024, 768)], ids=str)
def test_the_last_wave_of_backward_programs_is_not_ragged(shape: tuple[int, int, int]) -> None:
    from etude.kernels.adaln_triton import LaunchConfig

    B, N, _ = shape
    c = LaunchConfig.for_shape(*shape, sms=132)
    programs, slots = B * -(-N // c.rows), 132 * 16 // c.backward_warps
    waves = programs / slots
    assert waves / -(-programs // slots) > 0.85
    assert LaunchConfig.for_shape(*shape, sms=13).rows >= c.rows, (
        "fewer processors, longer programs"
    )
