"""What is made of a tensor is made once, until it changes or goes."""

import gc

import numpy as np
import pytest
import torch

from etude.metrics import remembered
from etude.metrics.kid import kid
from etude.metrics.prdc import prdc
from etude.metrics.remembered import remember


def test_once_per_tensor_and_key_until_it_is_written_to() -> None:
    made = []

    def make() -> int:
        made.append(1)
        return len(made)

    x, y = torch.zeros(3), torch.zeros(3)
    assert [remember(x, "a", make), remember(x, "a", make)] == [1, 1]
    assert [remember(x, "b", make), remember(y, "a", make)] == [2, 3]
    x += 1
    assert remember(x, "a", make) == 4


def test_nothing_outlives_the_tensor() -> None:
    x = torch.zeros(3)
    remember(x, "a", lambda: torch.ones(1))
    before = len(remembered._kept)
    del x
    gc.collect()
    assert len(remembered._kept) == before - 1


def test_a_tensor_whose_changes_are_not_counted_is_looked_at_again() -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
        found = [remember(x, "sum", lambda: float(x.sum()))]
        x += 1  # a buffer that is used again
        found.append(remember(x, "sum", lambda: float(x.sum())))
    assert found == [0.0, 3.0]


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("first", [0, 1])  # a view may begin within a word
def test_what_others_write_to_its_memory_is_seen_wherever_it_is(dtype: type, first: int) -> None:
    """More than one row of the table, and a rest that fills no row and no word."""
    array = (np.random.default_rng(0).random(20_011) * 200).astype(dtype)
    x = torch.from_numpy(array)[first:]
    made = []

    def looked() -> int:
        remember(x, "a", lambda: made.append(1))
        return len(made)

    assert [looked(), looked()] == [1, 1]
    for count, place in enumerate((first, 9000, -2500, -1), 2):
        array[place] += 1
        assert looked() == count
    array[first:] = array[first:][::-1].copy()  # the same numbers elsewhere
    assert looked() == 6
    words = 8192 // array.itemsize
    array[first : first + 2 * words] = np.roll(array[first : first + 2 * words], words)  # two rows
    assert [looked(), looked()] == [7, 7]


def test_a_numpy_array_filled_again_is_measured_again() -> None:
    array = np.random.default_rng(1).normal(size=(50, 4))
    x, y = torch.from_numpy(array), torch.from_numpy(np.random.default_rng(2).normal(size=(40, 4)))
    for _ in range(2):
        assert kid(x, y) == kid(x.clone(), y)
        assert prdc(x, y) == prdc(x.clone(), y)
        array *= 3


def test_no_part_of_the_content_is_left_out_on_strides() -> None:
    whole = torch.zeros(40, 600, dtype=torch.float64)
    x = whole[:, ::2]
    assert remember(x, "sum", lambda: float(x.sum())) == 0.0
    whole.data[39, 598] = 2.0
    assert remember(x, "sum", lambda: float(x.sum())) == 2.0
