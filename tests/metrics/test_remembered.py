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


def test_tensors_of_inference_mode_have_no_version() -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
    assert remember(x, "a", lambda: 5) == remember(x, "a", lambda: 6) == 5
