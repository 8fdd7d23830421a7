"""What is made of a tensor is made once, until it changes or goes."""

import gc

import torch

from etude.metrics import remembered
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
