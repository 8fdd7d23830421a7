"""Mixup and CutMix: the distributions of what is drawn, and what becomes of a batch."""

import numpy as np
import pytest
import torch
from scipy import stats

from etude.data.mixing import cut, draw_mix, mixed, mixed_targets

STEPS = range(2000)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 3.0])
def test_shares_of_mixup_are_beta_distributed(alpha: float) -> None:
    shares = [draw_mix(1, step, alpha, 0.0, (8, 8)).share for step in STEPS]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert shares[7] == draw_mix(1, 7, alpha, 0.0, (8, 8)).share
    assert shares[7] != draw_mix(2, 7, alpha, 0.0, (8, 8)).share


def test_rectangles_have_the_stated_sides_and_centres_and_set_the_share() -> None:
    mixes = [draw_mix(1, step, 0.0, 1.0, (40, 60)) for step in STEPS]
    shares = np.array([draw_mix(1, step, 1.0, 0.0, (40, 60)).share for step in STEPS])
    top, left, bottom, right = np.array([mix.box for mix in mixes]).T
    assert (0 <= top).all() and (bottom <= 40).all() and (0 <= left).all() and (right <= 60).all()
    area = (bottom - top) * (right - left) / 2400
    np.testing.assert_allclose([mix.share for mix in mixes], 1 - area, atol=1e-12)
    whole = (top > 0) & (bottom < 40) & (left > 0) & (right < 60)
    assert whole.sum() > 300
    sides = np.sqrt(1 - shares[whole])
    assert (abs((bottom - top)[whole] - 40 * sides) <= 2).all()
    assert (abs((right - left)[whole] - 60 * sides) <= 2).all()
    small = shares > 0.98  # their middle is the drawn centre: uniform over the picture
    for low, high, extent in ((top, bottom, 40), (left, right, 60)):
        middle = ((low + high) / 2)[small] / extent
        assert stats.kstest(middle, "uniform").pvalue > 0.01


def test_a_fair_coin_chooses_where_both_are_on() -> None:
    cuts = sum(draw_mix(3, step, 0.2, 1.0, (8, 8)).box is not None for step in STEPS)
    assert abs(cuts - 1000) < 4 * np.sqrt(500)
    assert all(draw_mix(3, step, 0.2, 0.0, (8, 8)).box is None for step in range(50))
    assert all(draw_mix(3, step, 0.0, 0.2, (8, 8)).box is not None for step in range(50))


def test_pictures_and_targets_are_mixed_alike() -> None:
    """Pictures whose every pixel is their one-hot target have their target as their mean."""
    labels, partners = torch.tensor([0, 2, 1]), torch.tensor([2, 2, 0])
    hot = torch.nn.functional.one_hot
    pictures, others = (
        hot(found, 3).double()[:, :, None, None].expand(-1, -1, 6, 8)
        for found in (labels, partners)
    )
    for mix in (
        draw_mix(1, 4, 0.5, 0.0, (6, 8)),
        cut(0.5, (2, 5), (6, 8)),
        cut(0.0, (3, 4), (6, 8)),
    ):
        means = mixed(pictures, others, mix).mean((2, 3))
        targets = mixed_targets(labels, partners, 3, mix.share)
        torch.testing.assert_close(targets.double(), means, rtol=0, atol=1e-6)
    assert cut(0.0, (3, 4), (6, 8)).box == (0, 0, 6, 8)
    assert cut(0.75, (0, 7), (6, 8)).box == (0, 5, 1, 8)  # cut by two borders
