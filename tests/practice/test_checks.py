"""Near and exact duplicates against brute force, and scores against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from etude.core.errors import UserError
from etude.practice.checks import overlap, refuse, same_classes
from etude.practice.pictures import Stored
from etude.practice.scores import SCORES, correctness


def stored(pixels: np.ndarray) -> Stored:
    return Stored(pixels, np.zeros(len(pixels), np.int64), ["a"])


@pytest.mark.parametrize("size", [8, 32, 33])
def test_overlap_is_brute_force(size: int) -> None:
    chance = np.random.default_rng(size)
    training = chance.integers(0, 256, (70, size, size, 3), dtype=np.uint8)
    test = chance.integers(0, 256, (40, size, size, 3), dtype=np.uint8)
    test[3] = training[60]  # exact
    for row, spread in ((7, 1.5), (8, 2.6), (9, 6.0)):  # levels, before rounding
        noise = spread * chance.normal(size=training[row].shape)
        test[row] = np.clip(np.rint(training[row] + noise), 0, 255)
    gaps = np.array(
        [[np.sqrt(np.mean((t.astype(float) - o) ** 2)) for o in training] for t in test]
    )
    for distance in (0.0, 2.0, 4.0):
        near = np.flatnonzero(gaps.min(axis=1) <= distance)
        expected = [(int(row), int(gaps[row].argmin())) for row in near]
        assert overlap(stored(test), stored(training), distance, batch=16) == expected
    assert [row for row, _ in overlap(stored(test), stored(training), 2.0)] == [3, 7]
    with pytest.raises(UserError, match=r"2 of 40 pictures of T .* number 3 \(there number 60"):
        refuse(overlap(stored(test), stored(training), 2.0), len(test), "T", "G")


def test_class_names_must_agree_by_index() -> None:
    same_classes(["a", "b"], ["a", "b"], "G", "test")
    same_classes([], ["a", "b"], "G", "test")  # names that are not known are not compared
    with pytest.raises(UserError, match="class 1 is 'b' to G but 'c' in test"):
        same_classes(["a", "b"], ["a", "c"], "G", "test")
    with pytest.raises(UserError, match="G draws 2 classes and test holds 3"):
        same_classes(["a", "b"], ["a", "b", "c"], "G", "test")


def test_scores_of_known_probabilities() -> None:
    sure = [1.0, 1e-30, 1e-30]
    p = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], sure], dtype=torch.float64)
    labels = torch.tensor([1, 0, 0])
    expected = {
        "entropy": [1.5 * math.log(2), math.log(3), 0.0],
        "margin": [0.75, 1.0, 0.0],
        "least_confidence": [0.5, 2 / 3, 0.0],
        "loss": [2 * math.log(2), math.log(3), 0.0],
        "el2n": [math.sqrt(0.25 + 0.5625 + 0.0625), math.sqrt(6) / 3, 0.0],
    }
    assert expected.keys() == SCORES.keys()
    for name, values in expected.items():
        assert SCORES[name](p.log(), labels).tolist() == pytest.approx(values, abs=1e-12), name


def test_correctness_follows_the_order_of_the_pictures() -> None:
    class Brightness(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = x.mean(dim=(1, 2, 3)) * self.scale
            return torch.stack([-mean, mean], dim=1)

    levels = np.array([0, 255, 100, 200, 30, 128])
    pixels = np.broadcast_to(levels[:, None, None, None], (6, 4, 4, 1)).astype(np.uint8)
    pictures = Stored(pixels, np.array([0, 1, 1, 1, 1, 1]), ["dark", "light"])
    found = correctness(Brightness(), pictures, batch=4)
    assert found.tolist() == [True, True, False, True, False, True]
