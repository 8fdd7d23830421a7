"""Nearest training pictures and label agreement by hand."""

import math

import numpy as np
import pytest
import torch

from etude.metrics.memorisation import label_agreement, nearest_pictures


def test_nearest_is_found_and_copies_stand_out() -> None:
    train = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 6)))
    fresh = torch.from_numpy(np.random.default_rng(1).normal(size=(30, 6)))
    near = nearest_pictures(fresh, train)
    exact = torch.cdist(fresh, train, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(near.distance.double(), exact.min(1).values, rtol=1e-6, atol=0)
    assert torch.equal(near.row, exact.argmin(1))
    assert near.figures()["median nearest distance"] > near.figures()["train-train quantile"]

    copied = nearest_pictures(train[5:25] + 1e-4, train)
    assert torch.equal(copied.row, torch.arange(5, 25))
    assert copied.figures()["median nearest distance"] < copied.figures()["train-train quantile"]
    assert copied.figures()["share below the quantile"] == 1.0


def test_the_quantile_leaves_out_the_picture_itself() -> None:
    train = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    near = nearest_pictures(torch.tensor([[2.9]]), train)
    assert near.train_distance.tolist() == [1.0, 1.0, 2.0, 4.0]
    assert near.figures(0.5)["train-train quantile"] == 1.5


def test_agreement_overall_and_per_class() -> None:
    asked = torch.tensor([0, 0, 1, 1, 1, 1])
    share, per_class = label_agreement(torch.tensor([0, 1, 1, 1, 1, 0]), asked, 3)
    assert share == pytest.approx(4 / 6)
    assert per_class[:2] == [0.5, 0.75] and math.isnan(per_class[2])


def test_the_gallery_shows_the_closest_pairs_first() -> None:
    train = torch.tensor([[0.0], [10.0], [20.0]])
    near = nearest_pictures(torch.tensor([[3.0], [20.5], [9.0], [30.0]]), train)
    assert near.gallery(3) == [(1, 2, 0.5), (2, 1, 1.0), (0, 0, 3.0)]
    assert len(near.gallery(10)) == 4
