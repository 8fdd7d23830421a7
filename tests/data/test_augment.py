"""Crops and flips: inside the picture, the stated areas, and functions of the position alone."""

import numpy as np
import pytest
from pydantic import ValidationError

from etude.data.augment import AugmentConfig, geometry

RNG = np.random.default_rng(0)
HEIGHTS, WIDTHS = RNG.integers(1, 400, 5000), RNG.integers(1, 400, 5000)
POSITIONS = np.arange(5000) + 10**10


def _random(**options):
    return AugmentConfig(image_size=32, crop="random", flip=True, **options)


def test_random_crops_stay_inside_and_have_the_stated_areas() -> None:
    cut = geometry(_random(scale=(0.3, 0.8)), 1, POSITIONS, HEIGHTS, WIDTHS)
    assert (cut.crop_top >= 0).all() and (cut.crop_left >= 0).all()
    assert (cut.crop_top + cut.crop_height <= HEIGHTS).all()
    assert (cut.crop_left + cut.crop_width <= WIDTHS).all()
    assert (cut.crop_height == cut.crop_width).all() and (cut.crop_height >= 1).all()
    large = np.minimum(HEIGHTS, WIDTHS) > 100
    area = (cut.crop_height / np.minimum(HEIGHTS, WIDTHS))[large] ** 2
    assert 0.28 < area.min() < 0.32 and 0.78 < area.max() < 0.82
    assert abs(area.mean() - 0.55) < 0.02  # uniform between 0.3 and 0.8


def test_every_offset_occurs_and_flips_are_fair() -> None:
    ones = np.full(4000, 10)
    cut = geometry(_random(scale=(0.49, 0.49)), 2, np.arange(4000), ones, ones)
    assert set(cut.crop_height) == {7}
    for offsets in (cut.crop_top, cut.crop_left):
        counts = np.bincount(offsets, minlength=4)
        assert len(counts) == 4 and abs(counts - 1000).max() < 5 * np.sqrt(1000 * 0.75)
    assert abs(cut.flip.mean() - 0.5) < 5 * 0.5 / np.sqrt(4000)
    assert abs(np.corrcoef(cut.crop_top, cut.flip)[0, 1]) < 0.08


def test_the_position_alone_decides() -> None:
    whole = geometry(_random(), 3, POSITIONS, HEIGHTS, WIDTHS)
    rows = RNG.permutation(5000)[:100]
    part = geometry(_random(), 3, POSITIONS[rows], HEIGHTS[rows], WIDTHS[rows])
    for name in vars(whole):
        assert (getattr(whole, name)[rows] == getattr(part, name)).all(), name
    other = geometry(_random(), 4, POSITIONS, HEIGHTS, WIDTHS)
    assert (other.crop_top != whole.crop_top).mean() > 0.5


def test_center_and_none() -> None:
    height, width = np.array([10, 7, 5]), np.array([6, 12, 5])
    center = geometry(AugmentConfig(image_size=8), 0, np.arange(3), height, width)
    assert center.crop_top.tolist() == [2, 0, 0] and center.crop_left.tolist() == [0, 2, 0]
    assert center.crop_height.tolist() == center.crop_width.tolist() == [6, 7, 5]
    none = geometry(AugmentConfig(image_size=8, crop="none"), 0, np.arange(3), height, width)
    assert none.row(1) == (0, 0, 7, 12, False)
    control = none.control()
    assert control["height"].tolist() == [10, 7, 5] and control["flip"].tolist() == [0, 0, 0]


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(ValidationError, match="no effect"):
        AugmentConfig(image_size=8, crop="center", scale=(0.5, 1))
    with pytest.raises(ValidationError, match="0 < min <= max <= 1"):
        AugmentConfig(image_size=8, crop="random", scale=(0.5, 1.5))


def test_still_removes_chance() -> None:
    still = _random(scale=(0.5, 1.0)).still()
    assert still == AugmentConfig(image_size=32, crop="center")
