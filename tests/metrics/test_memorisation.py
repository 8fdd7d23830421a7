"""Nearest training pictures and label agreement by hand."""

import math

import numpy as np
import pytest
import torch

from etude.core.errors import UserError
from etude.metrics.memorisation import NearestPictures, label_agreement, nearest_pictures


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


def test_duplicates_in_the_training_set_do_not_hide_copies() -> None:
    rng = np.random.default_rng(2)
    fresh, same = rng.normal(size=(95, 5)), rng.normal(size=(1, 5))
    train = np.concatenate([fresh[:50], same, fresh[50:], same.repeat(5, 0), fresh[:1]])
    given, real = (torch.from_numpy(rows) for rows in (train[:40].copy(), train))
    found = nearest_pictures(given, real).figures()
    distinct = np.concatenate([fresh, same])
    gaps = np.sqrt(((distinct[:, None] - distinct[None]) ** 2).sum(2))
    nearest = np.sort(gaps, 1)[:, 1]
    assert found["train-train quantile"] == pytest.approx(np.quantile(nearest, 0.05), rel=1e-6)
    assert found["share below the quantile"] == 1.0 and found["training duplicates"] == 6


def test_the_median_lies_between_the_two_in_the_middle() -> None:
    near = nearest_pictures(torch.tensor([[1.0], [9.0]]), torch.tensor([[0.0], [100.0]]))
    assert near.figures()["median nearest distance"] == 5.0


def test_a_copy_counts_where_no_distance_is_below_the_quantile() -> None:
    near = NearestPictures(torch.tensor([0.0, 1.0]), torch.zeros(2), torch.zeros(3), 0)
    assert near.figures()["share below the quantile"] == 0.5


def test_training_pictures_without_another_are_refused() -> None:
    with pytest.raises(UserError, match="training features need 2 rows, got 1"):
        nearest_pictures(torch.ones(3, 2), torch.ones(1, 2))
    with pytest.raises(UserError, match="are all equal"):
        nearest_pictures(torch.zeros(3, 2), torch.ones(4, 2))


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
