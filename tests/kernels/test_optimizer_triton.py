"""The Triton twin of `adamw_ema`, run by the interpreter with a fused multiply-add that is one."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="module")
def rows(interpret: Callable[[str], list[dict]]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in interpret("optimizer"):
        found.setdefault(row["check"], []).append(row)
    return found


def test_one_step_is_within_a_unit_of_float64(rows) -> None:
    """Half a unit for the rounding at the end, up to another where the last two terms cancel."""
    found = rows["float64"][0]["errors"]
    assert found.keys() == {"param", "exp_avg", "exp_avg_sq", "ema0", "ema1"}
    assert max(found.values()) <= 1.5, found


# The reference rounds once. Two steps of the twin: each within a unit, and what the first left
# enters the second. What lies around the tensors is compared too.
def test_all_sizes_alignments_profiles_and_dtypes_equal_the_reference(rows) -> None:
    assert len(rows["reference"]) == 6
    bad = [row for row in rows["reference"] + rows["mixed"] if not row["error"] <= 4]
    assert not bad, bad


def test_found_inf_leaves_every_bit(rows) -> None:
    assert rows["guarded"][0]["kept"]


def test_bits_repeat_and_do_not_depend_on_how_a_tensor_is_cut(rows) -> None:
    assert rows["bits"] == [{"check": "bits", "slices": True, "repeats": True}]


def test_every_tensor_keeps_its_own_count(rows) -> None:
    assert rows["many"][0]["steps"] and rows["many"][0]["error"] <= 2, rows["many"]


def test_tables_are_found_again_and_are_bounded(rows) -> None:
    (row,) = rows["tables"]
    assert row["first"] == row["second"] == 3  # addresses, chunks, settings
    assert row["kept"] <= 16 and row["error"] <= 2, row
    assert row["aligned"] == [1, 0]  # 16-byte accesses: of a tensor at a multiple of 16 alone


def test_the_operator_is_one_step_for_torch_compile(rows) -> None:
    assert rows["compiled"][0]["same"]
