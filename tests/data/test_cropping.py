"""Shifts, crops, mirroring and erasing: exact pixels, stated distributions, positions alone."""

import numpy as np
import torch
from PIL import Image
from scipy import stats

from etude.data.cropping import (
    Boxes,
    crop_boxes,
    erase_boxes,
    erased,
    mirrored,
    resized_crops,
    shifted,
)
from etude.kernels.resizing import columns_first

COUNT = 3000
POSITIONS = np.arange(COUNT) + 10**10


def pictures(count: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    chance = np.random.default_rng(0)
    levels = chance.integers(0, 256, (count, channels, height, width), dtype=np.uint8)
    return torch.from_numpy(levels)


def test_resized_crops_are_pillows_to_the_bit() -> None:
    """Where Pillow takes the height first (from version 13 on), within one level."""
    images, first = pictures(90, 40, 30), 0
    boxes = crop_boxes(np.arange(90), 1, (40, 30), (0.05, 1.0), (0.5, 2.0))
    for size in (8, 24, 37):
        found = resized_crops(images, boxes, size).permute(0, 2, 3, 1).numpy()
        for i in range(90):
            top, left, height, width = (int(v[i]) for v in vars(boxes).values())
            cut = Image.fromarray(images[i].permute(1, 2, 0).numpy())
            cut = cut.crop((left, top, left + width, top + height))
            expected = np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR))
            if columns_first(height, width, (size, size)):
                first += 1
                assert abs(found[i].astype(int) - expected).max() <= 1
            else:
                assert np.array_equal(found[i], expected), (i, size)
    assert 0 < first < 100


def test_crops_have_the_stated_areas_shapes_and_places() -> None:
    size, scale, ratio = (200, 200), (0.2, 0.5), (0.75, 4 / 3)
    boxes = crop_boxes(POSITIONS, 2, size, scale, ratio)
    top, left, height, width = vars(boxes).values()
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 200).all() and (left + width <= 200).all()
    area = height * width / 40_000
    assert stats.kstest(area, stats.uniform(0.2, 0.3).cdf).pvalue > 0.01
    shape = np.log(width / height) / np.log(4 / 3)  # whole pixels: within a percent
    assert stats.kstest(shape, stats.uniform(-1, 2).cdf).statistic < 0.04
    for start, extent in ((top, height), (left, width)):
        assert stats.kstest((start + 0.5) / (201 - extent), "uniform").pvalue > 0.01


def test_a_crop_that_never_fits_is_the_largest_about_the_centre() -> None:
    wide = crop_boxes(np.arange(3), 0, (10, 100), (0.9, 1.0), (0.75, 4 / 3))
    assert [list(v) for v in vars(wide).values()] == [[0] * 3, [43] * 3, [10] * 3, [13] * 3]
    tall = crop_boxes(np.arange(3), 0, (100, 10), (0.9, 1.0), (0.75, 4 / 3))
    assert [list(v) for v in vars(tall).values()] == [[43] * 3, [0] * 3, [13] * 3, [10] * 3]


def test_shifts_are_uniform_and_exact() -> None:
    image = pictures(1, 6, 7, 1).clamp(min=1)
    found = shifted(image.expand(2500, -1, -1, -1), POSITIONS[:2500], 2, 1)
    padded = np.pad(image[0, 0].numpy(), 2)
    counts = []
    for top in range(5):
        for left in range(5):
            crop = torch.from_numpy(padded[top : top + 6, left : left + 7])
            counts.append(int((found[:, 0] == crop).flatten(1).all(1).sum()))
    assert sum(counts) == 2500
    assert 0 < sum((c - 100) ** 2 / 100 for c in counts) < 46  # chi-square, 24 degrees, p of 0.004


def test_half_are_mirrored() -> None:
    images = pictures(COUNT, 2, 5, 1)
    found = mirrored(images, POSITIONS, 1)
    same = (found == images).flatten(1).all(1)
    assert torch.equal(found[~same], images[~same].flip(-1))
    assert abs(int(same.sum()) - COUNT / 2) < 4 * np.sqrt(COUNT / 4)


def test_erasing_hits_its_share_with_the_stated_rectangles() -> None:
    boxes = erase_boxes(POSITIONS, 1, (100, 100), 0.25)
    hit = boxes.height > 0
    assert abs(hit.sum() - COUNT / 4) < 4 * np.sqrt(COUNT * 3 / 16)
    area = (boxes.height * boxes.width)[hit] / 10_000
    assert stats.kstest(area, stats.uniform(0.02, 0.31).cdf).pvalue > 0.01
    shape = (boxes.height / boxes.width)[hit]
    assert 0.28 < shape.min() < 0.36 and 2.8 < shape.max() < 3.6
    assert (boxes.top + boxes.height <= 100).all() and (boxes.left + boxes.width <= 100).all()
    x = torch.rand(COUNT, 2, 100, 100)[:40] + 1
    found = erased(x, erase_boxes(POSITIONS[:40], 1, (100, 100), 0.25))
    for i in range(40):
        expected = x[i].clone()
        top, left, height, width = (int(v[i]) for v in vars(boxes).values())
        expected[:, top : top + height, left : left + width] = 0
        assert torch.equal(found[i], expected)


def test_the_position_alone_decides() -> None:
    rows, images = np.array([7, 2, 90]), pictures(100, 12, 12)
    where = POSITIONS[:100]
    for change in (
        lambda x, p: shifted(x, p, 3, 5),
        lambda x, p: mirrored(x, p, 5),
        lambda x, p: resized_crops(x, crop_boxes(p, 5, (12, 12), (0.1, 1), (0.5, 2)), 9),
        lambda x, p: erased(x, erase_boxes(p, 5, (12, 12), 0.9)),
    ):
        whole = change(images, where)
        assert torch.equal(change(images[rows], where[rows]), whole[rows])
        assert not torch.equal(change(images, where + 1), whole)
    assert len(Boxes(*[where] * 4)) == 100
